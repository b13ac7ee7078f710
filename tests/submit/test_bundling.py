"""`pgolf bundle` and `unbundle`: three files that vouch for each other, and every way in which they may not."""

import json
import subprocess
import sys

import pytest

from pgolf import __main__
from pgolf.artifact import script
from pgolf.artifact.bundle import ENTRY
from pgolf.submit import bundling, unbundle
from pgolf.submit.bundling import manifest, twin, untwin, verify


@pytest.fixture
def written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "make", lambda *_: made)
    assert bundling.main(["--out", str(tmp_path / "out")], {}) == 0
    return tmp_path / "out"


def test_three_files_that_agree(written, made, capsys):
    assert {p.name for p in written.iterdir()} == {"train_gpt.py", "train_gpt_readable.py", "train_gpt_manifest.json"}
    assert (written / "train_gpt.py").read_bytes() == made.data
    told = json.loads((written / "train_gpt_manifest.json").read_text())
    assert told == json.loads(json.dumps(manifest(made))) and told["bytes"] == len(made.data)
    capsys.readouterr()
    assert unbundle.main([str(written)], {}) == 0
    out = capsys.readouterr().out
    assert "verified" in out and "pgolf/finish.py" in out


def test_the_twin_has_every_source_to_the_letter(made, root):
    back = untwin(twin(made))
    assert back.keys() == made.files.keys()
    for name, text in back.items():
        assert text == (root / name).read_text(encoding="utf-8")


def test_the_manifest_is_the_same_again_and_has_no_place_or_time(made):
    text = json.dumps(manifest(made))
    assert text == json.dumps(manifest(made)) and str(ENTRY.parent) not in text


def test_a_changed_byte_anywhere_is_found(made):
    told, text = manifest(made), twin(made)
    read = script.read(made.data)
    assert verify(read, told, text) == []
    assert verify(script.read(made.data.replace(b"pgolf-", b"pgolg-")), told, text)
    assert verify(read, told, text.replace("def finish", "def fin1sh", 1))
    assert verify(read, told, None) == ["there is no train_gpt_readable.py"]
    name = "pgolf/finish.py"
    for change in ({**told, "sha256": "0"}, {**told, "files": {}}, {**told, "files": None}, {},
                   {**told, "files": {**told["files"], name: {**told["files"][name], "source_sha256": "0"}}},
                   {**told, "files": {**told["files"], name: 7}}):  # fmt: skip
        assert verify(read, change, text), change


def test_unbundle_refuses_what_does_not_hold(written, capsys):
    twin_file = written / "train_gpt_readable.py"
    twin_file.write_text(twin_file.read_text().replace("16_000_000", "17_000_000"))
    assert __main__.main(["unbundle", str(written)], {}) == 9
    assert "pgolf/artifact/budget.py: its source_sha256 is not the manifest's" in capsys.readouterr().err


def test_unbundle_writes_and_shows_the_files(written, made, tmp_path, capsys):
    assert unbundle.main([str(written / "train_gpt.py"), "--out", str(tmp_path / "in")], {}) == 0
    got = {p.relative_to(tmp_path / "in").as_posix(): p.read_text() for p in (tmp_path / "in").rglob("*.py")}
    assert got == made.files
    capsys.readouterr()
    assert unbundle.main([str(written), "--show", "train_gpt.py"], {}) == 0
    assert capsys.readouterr().out.strip() == made.files["train_gpt.py"].strip()
    assert __main__.main(["unbundle", str(written), "--out", str(tmp_path / "in")], {}) == 2
    assert __main__.main(["unbundle", str(written), "--show", "nothing.py"], {}) == 2
    assert __main__.main(["unbundle", str(tmp_path / "nowhere")], {}) == 2


def test_unbundle_runs_nothing(tmp_path, capsys):
    (tmp_path / "train_gpt.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert unbundle.main([str(tmp_path)], {}) == 0
    assert not (tmp_path / "ran").exists() and "not verified" in capsys.readouterr().out


@pytest.mark.slow
def test_the_twin_gives_the_script_again(written, capsys, monkeypatch):
    """A reviewer needs no trust: minifying the readable sources gives the bytes that ship."""
    monkeypatch.undo()
    assert unbundle.main([str(written), "--rebuild"], {}) == 0
    assert "byte for byte" in capsys.readouterr().out
    told = json.loads((written / "train_gpt_manifest.json").read_text())
    text = (written / "train_gpt_readable.py").read_text()
    other = text.replace("16_000_000", "17_000_000")
    assert "another script" in bundling.rebuilt(other, told["made_by"], (written / "train_gpt.py").read_bytes())
    assert "not rebuilt" in bundling.rebuilt(text, "Python 2.7", b"")


def test_a_script_alone_still_gets_a_twin_and_a_manifest(made, tmp_path):
    """The checkout may have moved on since the run."""
    read = script.read(made.data)
    bundling.write(read, tmp_path)
    told = json.loads((tmp_path / "train_gpt_manifest.json").read_text())
    assert "only the script" in told["made_by"]
    assert verify(read, told, (tmp_path / "train_gpt_readable.py").read_text()) == []


@pytest.mark.slow
def test_every_module_of_the_bundle_imports_in_a_clean_interpreter(made, tmp_path):
    """Minified or not: each file by itself, from the unpacked folder, with nothing else on the path."""
    for name, text in made.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = [n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in made.files]
    modules = [f"pgolf.{m}" if m.startswith("kernels.") else m for m in modules]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module\n"
        "print('all')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={"PATH": "/usr/bin"},
    )
    assert done.stdout == "all\n", done.stderr[-2000:]
