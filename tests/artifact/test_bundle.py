"""The bundle: right files, same behaviour in a clean interpreter, deterministic, readable without running it."""

import ast
import base64
import glob
import lzma
import os
import subprocess
import sys
import tempfile
import textwrap
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import made

from pgolf.artifact import minify, script
from pgolf.artifact.bundle import COPY, ENTRY, bundle, code_bytes, made_by
from pgolf.artifact.closure import closure
from pgolf.artifact.minify import interface, strip
from pgolf.errors import ArtifactError

FILES = {
    "train_gpt.py": '''
        """The entry."""
        import sys  # comment
        from pgolf.train import run

        if __name__ == "__main__":
            sys.exit(run(sys.argv[1:]))
    ''',
    "pgolf/__init__.py": '"""Package."""\n__version__ = "1"\n',
    "pgolf/kernels.py": """
        from pathlib import Path
        __path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
    """,
    "pgolf/train.py": '''
        from __future__ import annotations
        import inspect
        import multiprocessing
        import os
        from dataclasses import dataclass, fields
        from . import leaf
        from .sub.deep import VALUE

        @dataclass(frozen=True)
        class Config:
            """Only a docstring and fields."""
            lr: float = 0.1  # learning rate
            text: str = "é \\\\0 # no comment 'quotes' \\"both\\""

        class Empty(Exception):
            """Nothing but a docstring."""

        def nothing():
            """Nothing but a docstring."""

        def child(queue):
            queue.put((os.getpid(), VALUE))

        def run(argv):
            """Lazy imports count too."""
            import pgolf.kernels.op as op
            from pgolf.kernels.other import other
            print(argv, [f.name for f in fields(Config)], Config(), VALUE, leaf.NAME, nothing())
            print(op.op(3), other(4), "def op" in inspect.getsource(op.op))  # Triton reads sources like this
            if "--spawn" in argv:
                ctx = multiprocessing.get_context("spawn")
                queue = ctx.Queue()
                p = ctx.Process(target=child, args=(queue,))
                p.start()
                print("child", queue.get(timeout=60)[1])
                p.join()
            if "--fork" in argv and os.fork() == 0:
                return 0  # through atexit
            if "--fork" in argv:
                os.wait()
                from pgolf import late, twice
                print("late", late.X, twice.X)
            if "--fail" in argv:
                raise Empty("failed")
            return 3 if "--three" in argv else 0
    ''',
    "pgolf/leaf.py": 'NAME = "leaf"\n',
    "pgolf/twice.py": '"""Docstring."""\n"""Another string."""\nX = 2\n',
    "pgolf/late.py": "X = 1\n",
    "pgolf/sub/__init__.py": "",
    "pgolf/sub/deep.py": "from ..leaf import NAME\nVALUE = NAME + '!'\n",
    "pgolf/unused.py": "SECRET = 'never shipped'\n",
    "pgolf/lab/__init__.py": "",
    "kernels/op.py": '''
        """Contract."""
        from .other import other
        def op(x: int) -> int:
            """Doc."""
            return other(x) + 1  # why
    ''',
    "kernels/other.py": "def other(x):\n    return x * 10\n",
    "kernels/spare.py": "SECRET = 1\n",
}


@pytest.fixture(params=["plain", "minified"])
def tool(request, monkeypatch):
    """Both ways to make a bundle: without python-minifier and with it."""
    if request.param == "plain":
        monkeypatch.setattr(minify, "minifier", lambda: None)
    else:
        pytest.importorskip("python_minifier", reason="python-minifier is not installed: only stripping is tested")


@pytest.fixture
def tree(tmp_path, tool):
    for name, text in FILES.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return tmp_path / "src"


def run(script, *args, cwd, temp):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"TMPDIR": str(temp)}
    return subprocess.run(
        [sys.executable, str(script), *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def written(tree, tmp_path):
    path = tmp_path / "elsewhere" / "bundle.py"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bundle(tree / "train_gpt.py"))
    return path


def test_closure_is_what_is_imported(tree):
    names = {p.relative_to(tree).as_posix() for p in closure(tree / "train_gpt.py")}
    assert names == FILES.keys() - {"pgolf/unused.py", "pgolf/lab/__init__.py", "kernels/spare.py"}


@pytest.mark.parametrize("args", [(), ("a", "b c"), ("--three",), ("--fork",), ("--spawn",), ("--fail",)])
def test_bundle_runs_like_the_package_and_leaves_nothing(tree, tmp_path, args):
    temp = tmp_path / "temp"
    temp.mkdir()
    path = written(tree, tmp_path)
    plain = run(tree / "train_gpt.py", *args, cwd=tree, temp=temp)
    packed = run(path, *args, cwd=path.parent, temp=temp)
    assert (packed.returncode, packed.stdout) == (plain.returncode, plain.stdout), packed.stderr
    assert plain.stdout and ("failed" in packed.stderr) == ("--fail" in args)
    assert list(temp.iterdir()) == [] and list(path.parent.iterdir()) == [path]


def test_two_processes_at_once_do_not_disturb_each_other(tree, tmp_path):
    path = written(tree, tmp_path)
    both = [subprocess.Popen([sys.executable, str(path), str(i)], stdout=subprocess.PIPE) for i in range(2)]
    outs = [p.communicate(timeout=60)[0].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0] and "['0']" in outs[0] and "['1']" in outs[1]


def test_bytes_are_deterministic_and_independent_of_place_time_and_comments(tree, tmp_path):
    first = bundle(tree / "train_gpt.py")
    other = tmp_path / "other"
    tree.rename(other)
    (other / "pgolf/leaf.py").write_text('"""New docstring."""\n# new comment\n\n\nNAME = "leaf"\n')
    os.utime(other / "kernels/op.py", (0, 0))
    assert bundle(other / "train_gpt.py") == first
    (other / "pgolf/leaf.py").write_text('NAME = "another"\n')
    assert bundle(other / "train_gpt.py") != first
    assert code_bytes(other / "train_gpt.py") == len(bundle(other / "train_gpt.py"))


def test_overhead_is_a_few_hundred_bytes_and_unneeded_text_is_not_shipped(tree, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/train_gpt.py").write_text("pass\n")
    assert len(bundle(tmp_path / "e/train_gpt.py")) < 800
    before = code_bytes(tree / "train_gpt.py")
    (tree / "pgolf/leaf.py").write_text(FILES["pgolf/leaf.py"] + "# " + "long comment " * 500)
    assert code_bytes(tree / "train_gpt.py") == before


def test_a_run_from_a_bundle_ships_that_bundle(tree, tmp_path):
    """Whatever made it and whatever is installed here: what counts is the script that runs."""
    (tree / "pgolf/leaf.py").write_text(
        "import sys\nfrom pathlib import Path\nNAME = 'leaf'\n"
        f"data = Path(sys.path[0], {COPY!r}).read_bytes()\nprint('own', len(data), data[:17])\n"
    )
    path = written(tree, tmp_path)
    out = run(path, cwd=path.parent, temp=tmp_path).stdout
    assert f"own {path.stat().st_size} {path.read_bytes()[:17]!r}" in out
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (unpacked / COPY).write_bytes(b"the bytes that run")
    assert bundle(unpacked / "train_gpt.py") == b"the bytes that run"
    assert "from a bundle" in made_by(unpacked / "train_gpt.py")
    assert made_by().startswith("Python 3.") and ("pip install" in made_by()) == (minify.minifier() is None)


def test_what_makes_bundles_is_in_none(root):
    names = {p.relative_to(root).as_posix() for p in closure(ENTRY)}
    assert "pgolf/artifact/bundle.py" in names
    assert not names & {f"pgolf/artifact/{n}.py" for n in ("script", "minify", "closure")}
    assert not [n for n in names if n.startswith(("pgolf/submit/", "pgolf/doctor/"))]


@pytest.mark.parametrize(
    "payload", [b"\0\x001\x007\0\0", bytes(range(256)) * 2, b'\\"\n\r\\0', b"\x85\x1a\x0c\xff\xa0"], ids=range(4)
)
def test_a_literal_keeps_every_byte(payload, monkeypatch):
    """The compressed bytes are anything: what Python reads of the literal is what was put there."""
    monkeypatch.setattr(script.lzma, "compress", lambda *a, **k: payload)
    code = script.compose({}, "train_gpt.py")
    literals = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert payload.decode("latin-1") in literals
    assert code.count(b"\n") == script.BOOTSTRAP.count("\n") and b"\r" not in code and b"\0" not in code


def undocumented(tree):
    """The same tree without docstrings, by another route than the bundler's: dump with each docstring cut out."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            is_text = [isinstance(n, ast.Expr) and isinstance(getattr(n.value, "value", 0), str) for n in body]
            node.body = body[[*is_text, False].index(False) :]
            node.body = [n for n in node.body if not isinstance(n, ast.Pass)]
    return ast.dump(tree)


@pytest.mark.parametrize("name", FILES)
def test_stripping_keeps_the_syntax_tree(tree, name):
    source = (tree / name).read_text(encoding="utf-8")
    assert undocumented(ast.parse(strip(tree / name))) == undocumented(ast.parse(source))


def test_stripping_keeps_every_file_of_this_repository(root):
    for path in [*root.glob("pgolf/**/*.py"), *root.glob("kernels/*.py")]:
        text = strip(path)
        assert undocumented(ast.parse(text)) == undocumented(ast.parse(path.read_text(encoding="utf-8")))
        assert ast.get_docstring(ast.parse(text)) is None


def test_minifying_keeps_what_others_see_of_every_file(root):
    pytest.importorskip("python_minifier", reason="python-minifier is not installed")
    for name, text in made().files.items():
        path, literal = root / name, name.startswith("kernels/")
        before, after = ast.parse(strip(path)), ast.parse(text)
        assert interface(before) == interface(after)
        assert not literal or ast.dump(before) == ast.dump(after), "Triton reads names and annotations"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def f(a, b=1): pass", "def f(a, c=1): pass"),
        ("def f(a, b=1): pass", "def f(a, b): pass"),
        ("class A(B): x: int = 1", "class A(B): x = 1"),
        ("class A(B): x: int = 1", "class A: x: int = 1"),
        ("class A:\n @property\n def f(self): pass", "class A:\n def f(self): pass"),
        ("if x:\n import y", "if x:\n import z"),
        ("def f(*, a): pass", "def f(a): pass"),
        ("X = 1", "Y = 1"),
    ],
)
def test_a_change_that_others_would_see_is_an_error(old, new, tmp_path, monkeypatch):
    """A minifier that is wrong is caught before anything ships."""
    stub = SimpleNamespace(minify=lambda text, **_: new, RemoveAnnotationsOptions=lambda **_: None)
    monkeypatch.setattr(minify, "minifier", lambda: stub)
    (tmp_path / "a.py").write_text(old)
    for literal in (True, False):
        with pytest.raises(ArtifactError, match="minifying would change"):
            minify.small(tmp_path / "a.py", literal=literal)


def test_missing_module_and_broken_file_are_named(tree):
    (tree / "pgolf/leaf.py").write_text("def lazy():\n    from pgolf.gone import x\n")
    with pytest.raises(ArtifactError, match=r"import pgolf\.gone"):
        bundle(tree / "train_gpt.py")
    (tree / "pgolf/leaf.py").write_text("def :\n")
    with pytest.raises(ArtifactError, match=r"leaf\.py"):
        bundle(tree / "train_gpt.py")
    with pytest.raises(ArtifactError, match="cannot bundle"):
        bundle(tree / "absent.py")


def test_reading_a_script_gives_its_files_back_without_running_it(tree):
    made = script.make(tree / "train_gpt.py")
    assert script.read(made.data).files == made.files and made.sources.keys() == made.files.keys()
    assert made.sources["pgolf/leaf.py"] == FILES["pgolf/leaf.py"] and made.made_by.startswith("Python 3.")


def test_the_usual_wrappers_are_opened():
    text = "# " + "".join(f"{i * i:x}" for i in range(400)) + "\nprint('hidden')\n"
    raw = text.encode()
    packed = {
        "lzma, base85": base64.b85encode(lzma.compress(raw)),
        "raw lzma2, base85": base64.b85encode(lzma.compress(raw, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])),
        "zlib, base64": base64.b64encode(zlib.compress(raw)),
        "zlib, bytes": zlib.compress(raw),
    }
    for name, payload in packed.items():
        wrapper = f"import lzma, zlib, base64\nexec(unpack({payload!r}))\n".encode()
        assert script.read(wrapper).files == {"train_gpt.py": text}, name
    assert script.read(raw).files == {"train_gpt.py": text}, "a script that hides nothing is itself"


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "c:\\evil.py", "a\nb"])
def test_a_script_that_would_write_outside_is_refused(name):
    with pytest.raises(ArtifactError, match="outside of its folder"):
        script.read(script.compose({name: "x = 1\n" * 200, "b.py": os.urandom(300).hex()}, "b.py"))


def test_bombs_and_what_is_no_python_are_refused(monkeypatch):
    monkeypatch.setattr(script, "MAX_TEXT", 10_000)
    with pytest.raises(ArtifactError, match="unpacks to more than 10,000 bytes"):
        script.read(script.compose({"a.py": os.urandom(20_000).hex()}, "a.py"))
    for data in (b"\0", b"def :", b"(" * 5000):
        with pytest.raises(ArtifactError, match="no Python"):
            script.read(data)


@pytest.mark.slow
def test_the_real_entry_describes_itself_from_its_bundle(tmp_path):
    path = tmp_path / "bundle.py"
    path.write_bytes(made().data)
    assert len(path.read_bytes()) == code_bytes()
    plain = run(ENTRY, "--describe", cwd=ENTRY.parent, temp=tempfile.gettempdir())
    packed = run(path, "--describe", cwd=tmp_path, temp=tmp_path)
    assert (packed.returncode, packed.stdout) == (plain.returncode, plain.stdout), packed.stderr
    assert plain.returncode == 0 and not glob.glob(f"{tmp_path}/pgolf-*")


def test_entry_is_the_repositorys(root):
    assert Path(root) / "train_gpt.py" == ENTRY
