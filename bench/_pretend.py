"""An H100 for torch.compile on a machine that has none: graphs are lowered, scheduled and fused as for the GPU.

Inductor decides what a kernel reads and writes before it generates code. Up to there it needs no device, only answers
about one. `install` gives these answers to a CPU-only torch; `lower` compiles that far and stops. Tensors are fake:
nothing is allocated on the device, no kernel is compiled, nothing runs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STUB = Path(__file__).with_suffix(".cpp")
KEPT: list = []  # registrations, which are undone when they are collected
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class CannotPretend(RuntimeError):
    """This torch, or this machine, cannot be made to believe in a GPU that is not there."""


def install() -> None:
    """Makes this process's torch believe in one H100. Call it once, before torch is imported; it cannot be undone.

    A CUDA build that has a GPU needs no pretence and gets none. Raises CannotPretend, with what is missing.
    """
    found = importlib.util.find_spec("torch")
    if found is None:
        raise CannotPretend("torch is not installed")
    root = Path(found.submodule_search_locations[0])
    real = (root / "lib/libtorch_cuda.so").exists()
    if not real:
        if "torch" in sys.modules:
            raise CannotPretend("torch is imported already: the stub must be loaded before it")
        with tempfile.TemporaryDirectory() as folder:
            _load(_build(root / "include", Path(folder)), root / "lib")
    import torch

    if real and not torch.cuda.is_available():
        raise CannotPretend("this torch is a CUDA build without a GPU: expected a CPU-only build, or a GPU")
    if not real:
        _answer(torch)
    torch.nn.functional.scaled_dot_product_attention = _flash_attention(torch)
    _try_out(torch)


def _build(headers: Path, folder: Path) -> Path:
    """Compiles the stub against torch's headers, about 3 s."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotPretend("there is no g++: apt-get install g++")
    out = folder / "stub.so"
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{headers}", str(STUB), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:500])
        raise CannotPretend(f"{STUB.name} does not compile against this torch's headers: {first}")
    return out


def _load(stub: Path, lib: Path) -> None:
    """Loads the stub behind the libraries that it registers with, and ahead of torch, which asks once."""
    try:
        for path in (lib / "libc10.so", lib / "libtorch_cpu.so", stub):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as err:
        raise CannotPretend(f"the stub does not load: {err}") from err


def _answer(torch) -> None:
    """What Python asks: properties, the current device, memory for constants."""
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: H100
    cuda.get_device_capability = lambda device=None: (H100.major, H100.minor)
    cuda.synchronize = lambda device=None: None
    cuda._lazy_init = lambda: None
    cuda._exchange_device = lambda index: 0
    cuda._maybe_exchange_device = lambda index: -1  # two functions: torch.compile tells them apart
    cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device="cuda": None
    # passes over the graph make small real tensors, of constants and examples: they live in host memory
    host = lambda make: lambda *size, dtype=None, **_: make(*size, dtype=dtype, device="cpu")
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", host(torch.empty), "CUDA")
    library.impl("empty_strided", host(torch.empty_strided), "CUDA")
    KEPT.append(library)


def _flash_attention(torch) -> Callable:
    """What `scaled_dot_product_attention` chooses on an H100. A CPU-only torch would spell the products out."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None:
            raise NotImplementedError("flash attention takes no mask")
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]

    return attention


def _try_out(torch) -> None:
    """Lowers a graph of two kernels each way; CannotPretend if anything goes wrong."""
    try:
        with fake_mode(), torch.device("cuda"):
            x = torch.empty((1024, 512), dtype=torch.bfloat16)
            w = torch.empty((512, 512), dtype=torch.bfloat16, requires_grad=True)
            graphs = lower(lambda x, w: (x @ w).tanh().sum(), x, w)
    except Exception as err:
        raise CannotPretend(f"torch {torch.__version__} does not lower for it: {type(err).__name__}: {err}") from err
    if [g.backward for g in graphs] != [False, True] or not all(k.moved for g in graphs for k in g.kernels):
        raise CannotPretend(f"torch {torch.__version__} lowers for it, but gives {graphs}")


def fake_mode() -> Any:
    """Tensors without data, on any device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled graph."""

    op: Any  # the OpOverload or name that is called; None for a kernel that Inductor generates
    moved: int  # bytes: each buffer that it reads or writes once, at most its size
    nodes: tuple  # fx nodes that it computes


@dataclass(frozen=True)
class Graph:
    """A forward or backward graph after fusion."""

    backward: bool
    kernels: list[Kernel]
    calls: list  # fx nodes of all calls, in order


class _Enough(BaseException):
    """Compilation has gone far enough. Not an Exception: nothing on the way may handle it."""


def lower(fn: Callable, *args) -> list[Graph]:
    """Compiles fn(*args), args being fake tensors, up to fusion. Returns the forward and the backward graph."""
    import torch
    from functorch.compile import make_boxed_func
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    graphs: list[Graph] = []

    def after_fusion(nodes):
        graphs.append(_graph(nodes))
        raise _Enough

    def inner(gm, inputs, **options):
        try:
            compile_fx_inner(gm, inputs, **options)
        except _Enough:
            if options.get("is_backward"):
                raise  # both are there: no need to call anything
        return make_boxed_func(gm)

    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend=lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner), fullgraph=True, dynamic=False
    )
    settings = {"_post_fusion_custom_pass": after_fusion, "fx_graph_cache": False, "compile_threads": 1}
    settings["shape_padding"] = False  # decided by timing products
    both = autograd_config.patch(force_non_lazy_backward_lowering=True)
    with warnings.catch_warnings(), config.patch(settings), both, suppress(_Enough):
        warnings.simplefilter("ignore")  # advice on settings of the GPU
        compiled(*args)
    return graphs


def _graph(nodes: list) -> Graph:
    """What the scheduler has, in words that do not change with torch's version."""
    from torch._inductor.virtualized import V

    kernels = []
    for node in nodes:
        inner = [n.node for n in node.get_nodes() if n.node is not None]
        moved = _moved(node, inner)
        if not moved:  # a view of one of another kernel's outputs, or nothing to do
            continue
        op = None
        if node.is_extern():
            op = getattr(inner[0], "op_overload", None) or getattr(inner[0], "python_kernel_name", "extern")
        kernels.append(Kernel(op, moved, tuple({o: None for i in inner for o in i.origins})))
    calls = [n for n in V.graph.module.graph.nodes if n.op == "call_function"]
    return Graph(V.graph.is_backward, kernels, calls)


def _moved(node, inner: list) -> int:
    """Bytes of a scheduled node. A library's kernel reads the views that it is given, not all of their buffers."""
    from torch._inductor.ir import MultiOutput
    from torch.utils import _pytree as pytree

    if not node.is_extern():
        return sum(node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).values())
    if isinstance(inner[0], MultiOutput):
        return 0
    written = sum(node.get_read_write_buffer_accesses(include_reads=False, include_writes=True).values())
    read = {id(x): int(x.get_numel()) * x.get_dtype().itemsize for x in pytree.tree_leaves(inner[0].inputs)}
    return written + sum(read.values())
