"""Rules on the files: what must be there, what must not, and what the script is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pgolf.submit.folder import MANIFEST, README, SCRIPT, TWIN, Folder
from pgolf.submit.record import NAME
from pgolf.submit.rules import Finding, Rule, fail, ok, skip, warn

# Packages that are generally available and that submissions use; what a run really needs is in its requirements.txt
KNOWN = {
    "torch", "numpy", "triton", "sentencepiece", "brotli", "zstandard", "safetensors", "rich", "matplotlib", "scipy",
    "flash_attn", "flash_attn_interface", "flash_attn_3", "huggingface_hub", "kernels", "tqdm", "datasets", "tiktoken",
    "transformers", "einops", "psutil", "tokenizers", "setuptools", "packaging", "pynvml", "requests", "mamba_ssm",
    "causal_conv1d", "python_minifier", "pgolf",
}  # fmt: skip
TEXTS = {
    ".md", ".json", ".py", ".txt", ".log", ".out", ".sh", ".toml", ".yaml", ".yml", ".cfg", ".csv", ".tsv", ".jsonl",
    ".cu", ".cpp", ".h", ".diff", ".patch", ".ipynb", "",
}  # fmt: skip
PICTURES = {".png", ".jpg", ".jpeg", ".svg", ".gif"}
TOKENIZERS = {".model", ".vocab"}
MODELS = {".pgolf", ".pt", ".pth", ".bin", ".ptz", ".safetensors", ".npz", ".npy", ".ckpt", ".pkl"}
# Where a machine's own folders show; what a path in a log says of its author is for them to decide
PLACES = re.compile(
    r"(?<![\w./:-])(?:/(?:home|root|Users|workspace|mnt|tmp|data)/[\w.-]+|[A-Z]:\\{1,2}Users\\{1,2}\w+)"
)
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})",
    "a W&B key": r"(?i)wandb[_-]?(?:api[_-]?)?key\W{1,5}[0-9a-f]{40}\b",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:RSA |EC |OPENSSH )?PRIVATE KEY-----",
}


def script_is_python(f: Folder) -> Finding:
    if f.script is None:
        return fail(f.script_error)
    n = len(f.script.files)
    return ok(f"{SCRIPT}: {len(f.script.data):,} bytes" + (f", which unpack to {n} files" if n > 1 else ""))


def imports(f: Folder) -> Finding:
    """Modules that neither Python, nor this folder, nor a general package provides: the script cannot run."""
    if f.script is None:
        return skip(f.script_error)
    here = {Path(n).stem for n in f.files if n.endswith(".py")} | {n.split("/")[0] for n in f.script.files}
    named = f.text("requirements.txt").replace("-", "_").lower() if "requirements.txt" in f.files else ""
    unknown = [n for n in sorted(f.modules() - here - KNOWN - sys.stdlib_module_names) if n.lower() not in named]
    if unknown:
        what = f"{SCRIPT} imports {', '.join(unknown)}: neither in the folder nor in requirements.txt"
        return warn(what, "add the file, or name the package in requirements.txt")
    return ok(f"{len(f.modules())} modules are imported; all are Python's, general packages or here")


def manifest(f: Folder) -> Finding:
    """The script and each of its files are those that the manifest lists, and the twin's texts are their sources."""
    if MANIFEST not in f.files:
        return fail(f.manifest_error) if f.is_ours else skip("the folder has no manifest of its script")
    if f.manifest is None or f.script is None:
        return fail(f.manifest_error or f.script_error)
    from pgolf.submit.bundling import verify

    twin = f.text(TWIN) if TWIN in f.files else None
    if faults := verify(f.script, f.manifest, twin):
        return fail("; ".join(faults[:5]), "write all three anew with `pgolf bundle`")
    return ok(f"{SCRIPT} and its {len(f.script.files)} files are those of {MANIFEST}, and {TWIN} is their source")


def complete(f: Folder) -> Finding:
    missing = [name for name in (README, NAME, SCRIPT) if not f.files.get(name)]
    if missing:
        return fail(f"missing or empty: {', '.join(missing)}")
    if len(f.text(README).strip()) < 200:
        return warn(
            f"{README} has {len(f.text(README).strip())} characters: method, results and how to reproduce them?"
        )
    return ok(f"{len(f.files)} files, {README}, {NAME} and {SCRIPT} among them")


def no_places(f: Folder) -> Finding:
    for name in (README, NAME, MANIFEST):
        if name in f.files and (found := PLACES.search(f.text(name))):
            return fail(f"{name} has an absolute path: {found[0]}", "say it relative to the folder")
    for name, text in f.script.files.items() if f.script else ():
        if found := re.search(r"""["'](/(?:home|root|Users|workspace)/[\w./-]+)["']""", text):
            return warn(f"{SCRIPT} ({name}) has an absolute path: {found[1]}")
    return ok("no absolute paths")


def no_secrets(f: Folder) -> Finding:
    texts = {n: f.text(n) for n in f.files if Path(n).suffix.lower() in TEXTS}
    texts |= {f"{SCRIPT}: {n}": t for n, t in (f.script.files.items() if f.script else ())}
    for name, text in texts.items():
        for what, pattern in SECRETS.items():
            if re.search(pattern, text):
                return fail(
                    f"{name} holds what looks like {what}", "revoke it at once: what was published stays public"
                )
    return ok(f"no tokens or keys in {len(texts)} texts")


def no_weights(f: Folder) -> Finding:
    suffix = {name: Path(name).suffix.lower() for name in f.files}
    if f.links:
        return fail(f"a link: {f.links[0]}", "a folder must hold its own files")
    if bad := [n for n, s in suffix.items() if s in MODELS]:
        return fail(f"weights or shards: {', '.join(bad[:5])}", "the artifact is not part of the folder")
    allowed = TEXTS | PICTURES | TOKENIZERS
    if other := [n for n, s in suffix.items() if s not in allowed]:
        return fail(f"files of unexpected kinds: {', '.join(other[:5])}")
    binary = [n for n, s in suffix.items() if s in TEXTS and n != SCRIPT and b"\0" in f.read(n)[:65536]]
    return fail(f"binary content under the name of a text: {', '.join(binary[:5])}") if binary else ok("texts only")


def not_run(f: Folder) -> Finding:
    return skip("this would execute the script; `--run` does, without network, in a folder of its own")


def not_scored_again(f: Folder) -> Finding:
    return skip("the folder holds no artifact; scoring one again needs it, the data, and the hardware")


def one_folder(f: Folder) -> Finding:
    return skip("what else a pull request changes does not show in its folder")


def no_early_look(f: Folder) -> Finding:
    return skip("when validation data were opened does not show in a folder")


RULES = {
    "PG021": Rule("the script is Python and unpacks", script_is_python),
    "PG022": Rule("the script runs alone, without network", not_run),
    "PG023": Rule("what the script imports exists", imports),
    "PG024": Rule("script, manifest and twin agree", manifest),
    "PG031": Rule("the artifact scores what the logs say", not_scored_again),
    "PG141": Rule("validation data are opened for evaluation only", no_early_look),
    "PG201": Rule("README, submission.json and script are there", complete),
    "PG202": Rule("no absolute paths", no_places),
    "PG203": Rule("no secrets", no_secrets),
    "PG204": Rule("no weights, links or binaries", no_weights),
    "PG205": Rule("nothing outside the folder is changed", one_folder),
}
