"""How the ops of this folder are made: registration, the choice between kernel and reference, launches.

An op is a `torch.library.custom_op` with a fake and, where it has a gradient, an autograd rule: one opaque node to
torch.compile, so that nothing folds it away and its neighbours still fuse. A kernel is launched through `launch` and
nowhere else, with block sizes from `kernels/_tuned.py`; so `recording` can show every launch of a step without a GPU,
and `bench/static.py` compiles just those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._triton import Missing, triton
from ._tuned import TABLE, Launch

LIBRARY = "pgolf"
INTERPRETER = 0  # the arch of a CPU: its launches have tiny blocks, so that small shapes have edges
SM_COUNT = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # multiprocessors a recorded launch assumes

# -- kernel or reference ---------------------------------------------------------------------------------------------

# op -> "triton" | "reference", for attention also a library's kernel; an op not here goes by its tensors' device
PATHS: dict[str, str] = {}


def use_kernel(op: str, x: Tensor) -> bool:
    """Whether `op` runs its kernel on x. Unless PATHS says otherwise: on a GPU always, on a CPU never."""
    path = PATHS.get(op)
    return (x.is_cuda or (x.is_meta and bool(_recordings))) if path is None else path != "reference"


@contextmanager
def paths(**chosen: str) -> Iterator[None]:
    """Sets paths for a while: `with paths(mlp="reference"): ...`."""
    before = dict(PATHS)
    PATHS.update(chosen)
    try:
        yield
    finally:
        PATHS.clear()
        PATHS.update(before)


# -- registration ----------------------------------------------------------------------------------------------------


def register_op(
    body: Callable, fake: Callable, *, setup: Callable | None = None, backward: Callable | None = None, mutates=()
) -> torch.library.CustomOpDef:
    """`body` as the op `pgolf::<its name without leading underscores>`; its schema comes from its annotations.

    fake: same signature, empty outputs of the right shapes, dtypes and strides. setup(ctx, inputs, output) and
    backward(ctx, *grads): the autograd rule; save inputs and outputs only. Outputs must not alias inputs.
    """
    name = body.__name__.strip("_")

    def watched(*args):
        with _watches[-1](name) if _watches else nullcontext():
            return body(*args)

    schema = torch.library.infer_schema(body, mutates_args=mutates)
    qualified = f"{LIBRARY}::{body.__name__.lstrip('_')}"
    op = torch.library.custom_op(qualified, watched, mutates_args=mutates, schema=schema)

    def fake_or_record(*args):
        return _recordings[-1].run(body, fake, args) if _recordings else fake(*args)

    op.register_fake(fake_or_record)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup)
    return op


_watches: list[Callable[[str], AbstractContextManager]] = []


@contextmanager
def watching(watch: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Inside, watch(name) is entered around the body of every op that runs: a profiler's ranges. Compiled or not."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.pop()


# -- launches --------------------------------------------------------------------------------------------------------


def arch_of(x: Tensor) -> int:
    """Compute capability of x's device as two digits, 90 for 9.0; INTERPRETER for a CPU."""
    if _recordings:
        return _recordings[-1].arch
    if not x.is_cuda:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def sm_count(x: Tensor) -> int:
    """Multiprocessors of x's device: the grid of a persistent kernel. 2 in the interpreter, so that programs loop."""
    if _recordings:
        return SM_COUNT[_recordings[-1].arch]
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def tuned(kernel: str, x: Tensor, shape_class: str = "*") -> Launch:
    """The row of the launch table for a kernel on x's device.

    Searches (arch, shape_class), (arch, "*"), then the same for the nearest lower arch. KeyError if there is none.
    """
    rows, arch = TABLE[kernel], arch_of(x)
    if _recordings:
        _recordings[-1].asked.append((kernel, shape_class))
    known = sorted({a for a, _ in rows if a <= arch and (a == INTERPRETER) == (arch == INTERPRETER)}, reverse=True)
    for candidate in known:
        for key in ((candidate, shape_class), (candidate, "*")):
            if key in rows:
                return rows[key]
    raise KeyError(f"{kernel}: no launch for sm_{arch} {shape_class} in kernels/_tuned.py, which has {sorted(rows)}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, how: Launch, **constants: Any) -> None:
    """Runs `kernel` over `grid`; block sizes, warps and stages come from `how`. An empty grid runs nothing.

    constants: the kernel's other constexpr parameters. CPU tensors need TRITON_INTERPRET=1, else ValueError.
    """
    if 0 in grid:
        return
    if _recordings:
        _recordings[-1].launches.append(Recorded(kernel, grid, args, how, constants))
        return
    tensors = (getattr(a, "base", a) for a in args)  # a TensorDescriptor's base is the tensor that it describes
    device = next(t.device for t in tensors if isinstance(t, Tensor))
    if device.type != "cuda" and not isinstance(kernel, Missing) and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{kernel.__name__}: got tensors on {device}, expected cuda; set TRITON_INTERPRET=1 before the first import"
            " to run kernels on a CPU, or choose the reference"
        )
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
    with torch.cuda.device(device.index if device.type == "cuda" else -1):  # -1: nothing to switch
        kernel[grid](*args, **how.blocks, **constants, **options)


@dataclass(frozen=True)
class Recorded:
    """One launch that a recording caught."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    how: Launch
    constants: dict[str, Any]


@dataclass
class Recording:
    """Launches as they would be on `arch`."""

    arch: int
    launches: list[Recorded] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (kernel, shape class) of every look-up in the table
    watch: Callable[[str], AbstractContextManager] = nullcontext  # entered around each op's body, with its name

    def run(self, body: Callable, fake: Callable, args: tuple) -> Any:
        """Runs an op's body on meta tensors and holds its fake to the same outputs."""
        with self.watch(body.__name__.strip("_")):
            real = body(*args)
        promised = fake(*args)
        if _layouts(real) != _layouts(promised):
            raise AssertionError(f"{body.__name__}: fake promises {_layouts(promised)}, the op gives {_layouts(real)}")
        return real


_recordings: list[Recording] = []


@contextmanager
def recording(arch: int, **options: Any) -> Iterator[Recording]:
    """Inside, ops on meta tensors run their bodies and record launches as on sm_<arch>; nothing is computed."""
    _recordings.append(Recording(arch, **options))
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def _layouts(out: Any) -> list:
    out = out if isinstance(out, tuple | list) else [out]
    return [(tuple(t.shape), t.dtype, t.stride()) if isinstance(t, Tensor) else t for t in out]


# -- checks and sizes ------------------------------------------------------------------------------------------------


def check_kernel_dtype(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless each tensor is fp32, bf16 or fp16: what a kernel takes where the reference takes any float."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{op}: {name} is {t.dtype}, expected float32, bfloat16 or float16 for the kernel")


def check_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors lie on `first`'s device."""
    for name, t in tensors.items():
        if t is not None and t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device}, expected {first.device} like the first argument")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def pow2(n: int) -> int:
    """The smallest power of two >= n, 1 for n < 1: the width of a block that holds a row of n."""
    return 1 << max(n - 1, 0).bit_length()
