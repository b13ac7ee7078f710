"""Checks of what is installed: versions against the minima, torch against the GPU, Triton, attention libraries."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgolf import node
from pgolf.doctor.rows import FAIL, NONE, OK, WARN, Check, Machine, Row, first_line

PYTHON = (3, 10)
# Distribution: (minimum, module). A test holds the minima to setup.py.
REQUIRED = {
    "numpy": ("1.26", "numpy"),
    "sentencepiece": ("0.2", "sentencepiece"),
    "brotli": ("1.1", "brotli"),
    "zstandard": ("0.22", "zstandard"),
    "safetensors": ("0.4", "safetensors"),
    "rich": ("13", "rich"),
    "matplotlib": ("3.8", "matplotlib"),
}
TRITON = "3.5"
CAPABILITY = (8, 0)  # of pgolf's kernels and of bf16
WHEELS = "https://download.pytorch.org/whl"


def python(machine: Machine) -> Iterator[Row]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        yield Row("python", FAIL, f"{version}, expected 3.10 or newer", "python3.11 -m venv .venv, then install again")
    else:
        yield Row("python", OK, f"{version} on {sys.platform}, {sys.executable}")


def settings(machine: Machine) -> Iterator[Row]:
    """Whether the environment's variables make a configuration."""
    if machine.settings_error:
        yield Row("settings", FAIL, machine.settings_error, "python train_gpt.py --help lists the variables")
    else:
        yield Row("settings", OK, f"preset {machine.config.preset}, device {machine.config.train.device}")


def packages(machine: Machine) -> Iterator[Row]:
    """Each required package: there, new enough, importable."""
    if machine.torch is None:
        again = "--force-reinstall " if node.version_of("torch") else ""
        yield Row("torch", FAIL, machine.torch_error or "not installed", f"pip install {again}'torch>={node.TORCH}'")
    else:
        yield _version_row("torch", machine.torch.__version__, node.TORCH)
    for name, (minimum, module) in REQUIRED.items():
        version = node.version_of(name)
        row = _version_row(name, version, minimum) if version else _missing(name, minimum)
        if row.status == OK and (why := _import_error(module)):
            fix = f"pip install --force-reinstall '{name}>={minimum}'"
            row = Row(name, FAIL, f"{version}, but it cannot be imported: {why}", fix)
        yield row


def _version_row(name: str, version: str, minimum: str) -> Row:
    if node.release(version) >= node.release(minimum):
        return Row(name, OK, version)
    return Row(name, FAIL, f"{version}, expected {minimum} or newer", f"pip install -U '{name}>={minimum}'")


def _missing(name: str, minimum: str) -> Row:
    return Row(name, FAIL, f"not installed, expected {minimum} or newer", f"pip install '{name}>={minimum}'")


def _import_error(module: str) -> str:
    """Why a module cannot be imported; empty when it can."""
    try:
        importlib.import_module(module)
    except Exception as err:  # a library of another build raises what it likes
        return f"{type(err).__name__}: {first_line(err)}"
    return ""


def cuda(machine: Machine) -> Iterator[Row]:
    """Whether torch sees the GPUs that the driver sees."""
    if machine.torch is None:
        yield Row("cuda", NONE, "no torch")
        return
    seen = len(node.smi_gpus({"uuid": "uuid"}, machine.smi))
    built, found = machine.torch.version.cuda, len(machine.gpus)
    hidden = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if found:
        text = f"CUDA {built}, {found} GPU{'s' * (found > 1)} visible"
        yield Row("cuda", OK, text + (f" of {seen}" if seen > found else "") + _driver(machine))
    elif seen and hidden is not None:
        what = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the {seen} GPU{'s' * (seen > 1)} of this machine"
        yield Row("cuda", WARN, what, "unset CUDA_VISIBLE_DEVICES")
    elif seen and not built:
        what = f"nvidia-smi sees {seen} GPUs, but torch {machine.torch.__version__} is built without CUDA"
        yield Row("cuda", FAIL, what, f"pip install --force-reinstall torch --index-url {WHEELS}/cu128")
    elif seen:
        why = _cuda_error(machine.torch)
        fix = "update the driver, or install a torch for an older CUDA from " + WHEELS
        yield Row("cuda", FAIL, f"nvidia-smi sees {seen} GPUs, torch sees none: {why}", fix)
    elif machine.config.train.device == "cuda":
        yield Row("cuda", FAIL, "device=cuda is set, and there is no CUDA device", "DEVICE=auto or DEVICE=cpu")
    else:
        yield Row("cuda", NONE, "no CUDA device: runs use the CPU")


def _driver(machine: Machine) -> str:
    rows = node.smi_gpus({"driver": "driver_version"}, machine.smi)
    return f", driver {rows[0]['driver']}" if rows else ", nvidia-smi does not answer"


def _cuda_error(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as err:
        return first_line(err)
    return "no reason given"


def architectures(machine: Machine) -> Iterator[Row]:
    """Whether torch's wheel holds code for each GPU, and what the GPU's generation means."""
    from pgolf.runtime import runs_on  # needs torch, which may be what is broken

    arches = machine.torch.cuda.get_arch_list() if machine.gpus else []
    for i, gpu in enumerate(machine.gpus):
        capability = (gpu.major, gpu.minor)
        here = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        if arches and not runs_on(arches, capability):
            what = f"{here}: this torch has no code for it, only {' '.join(arches)}"
            wheel = "cu128" if capability > CAPABILITY else "cu126"
            fix = f"pip install --force-reinstall torch --index-url {WHEELS}/{wheel}"
            yield Row(f"gpu {i}", FAIL, what, fix)
        elif capability < CAPABILITY:
            what = f"{here}: no bf16 and no kernels below sm_80; a run uses fp32 and plain torch, several times slower"
            yield Row(f"gpu {i}", WARN, what, "a GPU of sm_80 (A100, RTX 30xx) or newer")
        else:
            yield Row(f"gpu {i}", OK, f"{here}, bf16")
    if not machine.gpus:
        yield Row("gpu", NONE, "no CUDA device; fp32 on the CPU, bf16 is for GPUs")


def triton(machine: Machine) -> Iterator[Row]:
    """Triton: installed, with a C compiler and Python's headers for its launchers, and a driver."""
    version, wanted = node.version_of("triton"), any((g.major, g.minor) >= CAPABILITY for g in machine.gpus)
    bad, install = (FAIL if wanted else NONE), f"pip install 'triton>={TRITON}'"
    if version is None:
        yield Row("triton", WARN if wanted else NONE, "not installed: plain torch instead of kernels", install)
        return
    if node.release(version) < node.release(TRITON):
        yield Row("triton", bad, f"{version}, expected {TRITON} or newer", f"pip install -U 'triton>={TRITON}'")
        return
    if why := _import_error("triton"):
        yield Row("triton", bad, f"{version}, but it cannot be imported: {why}", f"{install} --force-reinstall")
        return
    if not wanted:
        yield Row(
            "triton", NONE, f"{version}; no GPU for its kernels: plain torch is used (TRITON_INTERPRET=1 for tests)"
        )
        return
    compiler, header = c_compiler(machine), python_header()
    if not compiler:
        yield Row("triton", FAIL, f"{version}, but there is no C compiler", "apt-get install -y gcc, or set CC")
    elif not header.is_file():
        fix = f"apt-get install -y python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        yield Row("triton", FAIL, f"{version}, but Python's headers are missing: {header}", fix)
    else:
        from triton.runtime import driver

        target = driver.active.get_current_target()
        yield Row("triton", OK, f"{version}, driver {target.backend} sm_{target.arch}, compiler {compiler}")


def python_header() -> Path:
    """Python.h where Triton looks for it."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own default names the wrong folder
    return Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"


def c_compiler(machine: Machine) -> str:
    """The compiler that Triton would take; empty without one."""
    asked = machine.environ.get("CC")
    return (shutil.which(asked) or "") if asked else shutil.which("gcc") or shutil.which("clang") or ""


def attention(machine: Machine) -> Iterator[Row]:
    """Which attention a run on each kind of GPU takes, and how to get the fastest."""
    if not machine.gpus:
        yield Row("attention", NONE, "no CUDA device: the reference")
        yield from _fa3(machine, False)
        return
    from pgolf.kernels.attention import explain

    kinds = {(g.major, g.minor): i for i, g in reversed(list(enumerate(machine.gpus)))}
    for capability, i in kinds.items():
        if capability >= CAPABILITY:
            name, why = explain(machine.torch.device("cuda", i))
            yield Row("attention", OK, f"{name} on sm_{capability[0]}{capability[1]} ({why})")
    yield from _fa3(machine, (9, 0) in kinds)


def _fa3(machine: Machine, hopper: bool) -> Iterator[Row]:
    if not hopper:
        version = node.version_of("flash_attn_3")
        yield Row("flash-attn-3", NONE, f"{version or 'not installed'}; needs sm_90 (H100, H200)")
        return
    install = f"pip install flash-attn-3 --index-url {WHEELS}/{'cu130' if _cuda_major(machine) >= 13 else 'cu126'}"
    spec = importlib.util.find_spec
    if spec("flash_attn_interface") is None:
        other = " (flash_attn 2 is, which pgolf does not use)" if spec("flash_attn") else ""
        if spec("flash_attn_3"):
            other = " (the package flash_attn_3 is there, without the module; another build of it)"
        yield Row("flash-attn-3", WARN, f"flash_attn_interface is not installed{other}; cuDNN is next", install)
    elif why := _import_error("flash_attn_interface"):
        # found but broken: a run would choose it and fail at its first step
        fix = f"for another torch or CUDA, as a rule: {install} --force-reinstall; or kernels.attention=cudnn"
        yield Row("flash-attn-3", FAIL, f"installed, but it cannot be imported: {why}", fix)
    else:
        yield Row("flash-attn-3", OK, node.version_of("flash_attn_3") or "installed")


def _cuda_major(machine: Machine) -> int:
    return (node.release(machine.torch.version.cuda or "") or (12,))[0]


def kernel(machine: Machine) -> Iterator[Row]:
    """Compiles and runs one kernel of pgolf on the first GPU, and compares it with its reference."""
    if not any((g.major, g.minor) >= CAPABILITY for g in machine.gpus) or node.version_of("triton") is None:
        yield Row("kernel", NONE, "no GPU with Triton to run one on")
        return
    i = next(i for i, g in enumerate(machine.gpus) if (g.major, g.minor) >= CAPABILITY)
    yield try_kernel(f"cuda:{i}")


def try_kernel(device: str) -> Row:
    """The row of cross_entropy on `device`."""
    try:
        off = _kernel_error(device)
    except Exception as err:  # Triton raises what its compiler, the C compiler or the driver raised
        fix = "KERNELS=reference runs without; the triton and triton cache rows may say why"
        return Row("kernel", FAIL, f"cross_entropy does not run: {type(err).__name__}: {first_line(err)}", fix)
    if off < 1e-3:
        return Row("kernel", OK, f"cross_entropy compiles and runs, {off:.0e} from its reference")
    fix = "KERNELS=reference; please report this with `pgolf doctor --json`"
    return Row("kernel", FAIL, f"cross_entropy is {off:.3g} off its reference, expected below 1e-3", fix)


def _kernel_error(device: str) -> float:
    import torch

    from pgolf.kernels.cross_entropy import cross_entropy, cross_entropy_ref

    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 1024, generator=gen).to(device)
    targets = torch.randint(0, 1024, (256,), generator=gen).to(device)
    got, _ = cross_entropy(logits, targets, cap=30.0)
    return (got - cross_entropy_ref(logits, targets, cap=30.0)[0]).abs().max().item()


CHECKS: dict[str, Check] = {
    "python": python,
    "settings": settings,
    "packages": packages,
    "cuda": cuda,
    "gpu": architectures,
    "triton": triton,
    "attention": attention,
    "kernel": kernel,
}
