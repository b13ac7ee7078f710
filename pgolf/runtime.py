"""What this machine can do, and what follows: dtype, compilation, attention back end, kernel path, each with a reason.
Chosen once, printed once, never changed behind the user's back."""

from __future__ import annotations

import errno
import mmap
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf.errors import SetupError
from pgolf.kernels import attention
from pgolf.kernels._triton import triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True)
class Runtime:
    """Everything the capability of the machine decides."""

    device: torch.device
    dtype: Choice  # "fp32" | "bf16"
    compile: Choice  # "on" | "off"
    kernels: dict[str, Choice]  # op -> "triton" | "reference", for attention the back end of the presets' shapes
    paths: dict[str, str]  # the same as pgolf.kernels._op takes it
    weight_cast: Choice  # "on" | "off"

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype.value]

    def lines(self) -> list[str]:
        """One line a choice, for the log; ops that share path and reason share a line."""
        parts = {"dtype": self.dtype, "compile": self.compile, "weight cast": self.weight_cast}
        shared: dict[Choice, list[str]] = {}
        for op, choice in self.kernels.items():
            shared.setdefault(choice, []).append(op)
        parts |= {f"kernels ({', '.join(ops)})": choice for choice, ops in shared.items()}
        head = f"device: {device_name(self.device)}, torch {torch.__version__}, python {platform.python_version()}"
        return [head, *(f"{name}: {c.value} ({c.reason})" for name, c in parts.items())]


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)} (sm_{''.join(map(str, torch.cuda.get_device_capability(device)))})"
        )
    return f"CPU, {torch.get_num_threads()} threads"


def choose(
    device: torch.device,
    *,
    dtype: str = "auto",
    compile: str = "auto",
    default_path: str = "auto",
    ops: Mapping[str, str] | None = None,
    weight_cast: str = "auto",
) -> Runtime:
    """Resolves the "auto" settings on `device`. Raises SetupError when what was asked for cannot be had.

    ops: op -> "auto" (what default_path says), "triton", "reference"; for attention also a library's kernel.
    """
    check_arch(device)
    cuda = device.type == "cuda"
    in_dtype = _dtype(device, dtype)
    numbers = DTYPES[in_dtype.value]
    chosen = {op: _path(device, op, asked, default_path, numbers) for op, asked in (ops or {}).items()}
    paths = {op: choice.value for op, choice in chosen.items()}
    if paths.get("attention") in ("fa3", "cudnn") and ops["attention"] == "auto":
        paths["attention"] = "auto"  # by call: another length or head width may need another back end
    compiling = _compile(cuda, compile)
    check_code_caches(compiling.value == "on", cuda)
    return Runtime(device, in_dtype, compiling, chosen, paths, _weight_cast(cuda, weight_cast))


def check_arch(device: torch.device) -> None:
    """SetupError when torch's wheel has no code for the GPU: its first kernel would fail, minutes later."""
    if device.type != "cuda":
        return
    arches, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    if arches and not runs_on(arches, capability):
        raise SetupError(
            f"{device_name(device)}: torch {torch.__version__} has no code for it, only {' '.join(arches)}\n"
            "Install a torch for this GPU, `python -m pgolf doctor` says which; or use DEVICE=cpu."
        )


def runs_on(arches: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `arches` (torch.cuda.get_arch_list()) runs on a device.

    Machine code sm_XY runs on X.Y and on later Y of the same X; sm_XYa on X.Y alone; compute_XY is compiled by the
    driver for everything from X.Y on.
    """
    for arch in arches:
        kind, _, text = arch.partition("_")
        digits, exact = text.rstrip("af"), text.endswith("a")
        if not digits.isdigit():
            continue
        has = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and not exact and has <= capability:
            return True
        if kind == "sm" and (has == capability or (not exact and has[0] == capability[0] and has[1] <= capability[1])):
            return True
    return False


def _dtype(device: torch.device, asked: str) -> Choice:
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked != "auto":
        if asked == "bf16" and device.type == "cuda" and not bf16:
            raise SetupError(
                f"train.dtype=bf16 on {device_name(device)}: bf16 needs compute capability 8.0; use train.dtype=fp32"
            )
        return Choice(asked, "asked for")
    if bf16:
        return Choice("bf16", "compute capability 8.0 or higher")
    return Choice("fp32", "no bf16 on this GPU" if device.type == "cuda" else "bf16 products are far slower on CPUs")


def check_code_caches(compiling: bool, cuda: bool) -> None:
    """SetupError when a cache of compiled code cannot be written to, or code not be loaded from it: else an import or
    the first graph would fail, with a traceback of torch's own."""
    places: dict[str, Callable[[], str]] = {"TORCHINDUCTOR_CACHE_DIR": _inductor_cache}
    if cuda and triton is not None:
        places["TRITON_CACHE_DIR"] = lambda: triton.knobs.cache.dir
    for variable, place in places.items():
        try:
            folder = Path(place())
            if compiling or cuda:
                _load_from(folder)
        except OSError as err:
            why = "it is mounted noexec" if err.errno == errno.EPERM else err.strerror
            raise SetupError(
                f"compiled code cannot be kept in the folder of {variable}: {why}{_named(err)}\n"
                f"Set {variable} to a folder that can be written and that programs may be run from."
            ) from err


def _inductor_cache() -> str:
    """Makes the folder, as importing torch._dynamo does, which torch's optimisers import without compiling anything."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def _named(err: OSError) -> str:
    return f" ({err.filename})" if err.filename else ""


def _load_from(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        if hasattr(mmap, "PROT_EXEC"):  # as loading a library does; not on Windows
            mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()


def _compile(cuda: bool, asked: str) -> Choice:
    if asked != "auto":
        return Choice(asked, "asked for")
    if cuda:
        return Choice("on", "GPU")
    return Choice("off", "on a CPU compiling takes longer than it saves in a run of minutes")


def _weight_cast(cuda: bool, asked: str) -> Choice:
    if asked != "auto":
        return Choice(asked, "asked for")
    return Choice("on", "GPU") if cuda else Choice("off", "on a CPU weights are used in fp32, as they are")


def _path(device: torch.device, op: str, asked: str, default: str, dtype: torch.dtype) -> Choice:
    """Kernel or reference for one op."""
    wanted = default if asked == "auto" else asked
    if wanted == "reference":
        return Choice("reference", "asked for")
    why_not = _no_kernels(device)
    if wanted == "auto" and why_not:
        return Choice("reference", why_not)
    if why_not and not _interpreting():
        raise SetupError(f"kernels.{op}={wanted}: {why_not}; use kernels.{op}=reference or auto")
    if op == "attention" and (device.type == "cuda" or asked in ("fa3", "cudnn")):
        try:
            return Choice(*attention.explain(device, asked, dtype=dtype))
        except ValueError as err:
            raise SetupError(f"kernels.{op}={asked}: {err}") from err
    interpreted = ", in Triton's interpreter" if why_not else ""
    return Choice("triton", "GPU" if wanted == "auto" else "asked for" + interpreted)


def _interpreting() -> bool:
    return triton is not None and triton.knobs.runtime.interpret


def _no_kernels(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`; empty when they can."""
    if device.type != "cuda":
        return "kernels need a GPU, this is a CPU (TRITON_INTERPRET=1 interprets them, for tests)"
    if triton is None:
        return "triton is not installed: pip install 'pgolf[cuda]'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels need compute capability 8.0"
    return ""
