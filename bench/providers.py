"""Who computes a case: pgolf's kernels, torch.compile and eager of the reference, libraries that have the same op.

`measure` builds what was asked for, guards it, and times all of it by turns in each mode. Nothing here knows pytest.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.kernels._op import paths
from pgolf.kernels.attention import exclude_own_value, explain

from .cases import Case, Make
from .cases.case import PRODUCTION, Inputs, Size
from .check import copies, find, outputs
from .guards import guard, refill, tensors, touch
from .timing import Timing, graphed, time_interleaved

WHOLE = 1 << 25  # inputs of at most as many numbers are guarded at the production size: 0.3 GB of fp64 each
GRAPHED = {"flat_update", "int6", "newton_schulz"}  # parts of the optimiser step: short, no synchronisation


@dataclass(frozen=True)
class Provider:
    """fn takes a case's inputs and returns what its reference does. writes: inputs that fn may change."""

    name: str
    fn: Callable[..., Any]
    writes: tuple[str, ...] = ()


# -- peers: built only where their library is installed --------------------------------------------------------------


def liger_norm() -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as norm

    def fn(terms, weights, norm_scale, eps, normalize):
        gain = torch.full(terms[0].shape[-1:], norm_scale, dtype=terms[0].dtype, device=terms[0].device)
        return terms[0], norm.apply(terms[0], gain, eps, 0.0, "llama", False)

    return fn


def liger_add_norm() -> Callable:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as add_norm

    def fn(terms, weights, norm_scale, eps, normalize):
        gain = torch.full(terms[0].shape[-1:], norm_scale, dtype=terms[0].dtype, device=terms[0].device)
        normed, total = add_norm.apply(*terms, gain, eps, 0.0, "llama", False)
        return total, normed

    return fn


def liger_cross_entropy() -> Callable:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as loss

    def fn(logits, targets, cap, entropy):  # its gradient replaces the logits
        return loss.apply(logits, targets, None, -100, 0.0, 0.0, "none", cap)[0].float()

    return fn


def liger_mlp() -> Callable:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction as relu2

    return lambda x, w_up, w_down, activation, slope: F.linear(relu2.apply(F.linear(x, w_up)), w_down)


def quack_norm() -> Callable:
    from quack import rmsnorm

    def fn(terms, weights, norm_scale, eps, normalize):
        gain = torch.full(terms[0].shape[-1:], norm_scale, dtype=torch.float32, device=terms[0].device)
        return terms[0], rmsnorm(terms[0], gain, eps=eps)

    return fn


def quack_add_norm() -> Callable:
    from quack import rmsnorm

    def fn(terms, weights, norm_scale, eps, normalize):
        gain = torch.full(terms[0].shape[-1:], norm_scale, dtype=torch.float32, device=terms[0].device)
        normed, total = rmsnorm(terms[0], gain, residual=terms[1], eps=eps, prenorm=True)
        return total, normed

    return fn


def flash_attention() -> Callable:
    """FlashAttention-2, the projection in plain torch."""
    from flash_attn import flash_attn_func

    def fn(q, k, v, xsa, logit_bound=None):
        o = flash_attn_func(q, k, v, causal=True)
        return exclude_own_value(o, v) if xsa else o

    return fn


LIGER, QUACK, FLASH = "liger_kernel", "quack", "flash_attn"
PEERS: dict[str, dict[str, tuple]] = {  # case -> library -> (what builds its fn, inputs that it writes to)
    "residual-norm_only": {LIGER: (liger_norm,), QUACK: (quack_norm,)},
    "residual-add_folded": {LIGER: (liger_add_norm,), QUACK: (quack_add_norm,)},
    "cross_entropy-v1024": {LIGER: (liger_cross_entropy, "logits")},
    "cross_entropy-v8192": {LIGER: (liger_cross_entropy, "logits")},
    "mlp-relu2": {LIGER: (liger_mlp,)},
    "attention-xsa_bound": {FLASH: (flash_attention,)},
}
ROUTES = ("triton", "cudnn", "fa3")  # back ends of pgolf's attention; "pgolf" is the one that it would choose


def installed() -> dict[str, bool]:
    """Whether each peer's library is there, without importing it."""
    libraries = sorted({library for of_case in PEERS.values() for library in of_case})
    return {library: importlib.util.find_spec(library) is not None for library in libraries}


def available(case: Case, device: str | torch.device) -> list[str]:
    """Names of the providers of a case on a device. On a CPU the reference alone: kernels would be interpreted."""
    device = torch.device(device)
    if device.type == "cpu":
        return ["eager"]
    there = installed()
    peers = [library for library in PEERS.get(case.id, ()) if there[library]]
    return ["pgolf", *_routes(case, device), "torch.compile", "eager", *peers]


def _routes(case: Case, device: torch.device) -> list[str]:
    if case.id != "attention-xsa_bound":
        return []
    out, chosen = [], explain(device)[0]
    for route in ROUTES:
        try:
            out += [f"pgolf:{route}"] * (explain(device, route)[0] != chosen)
        except ValueError:  # cannot run here
            continue
    return out


def build(name: str, case: Case) -> Provider:
    """The provider of a name that `available` gave."""
    fn, ref = case.timed or (case.fn, case.ref)
    if name in PEERS.get(case.id, ()):
        maker, *writes = PEERS[case.id][name]
        return Provider(name, maker(), tuple(writes))
    if name.startswith("pgolf:"):
        return Provider(name, _routed(fn, case.op, name.partition(":")[2]), case.writes)
    if name == "torch.compile":
        return Provider(name, _compiled(ref, case.writes), case.writes)
    return Provider(name, {"pgolf": fn, "eager": ref}[name], case.writes)


def _compiled(ref: Callable, writes: tuple[str, ...]) -> Callable:
    """torch.compile of ref. Inputs that it writes to do not leave the graph as outputs, on which Inductor of torch 2.13
    fails ("KeyError: 'buf6'"); they are what ref returns first, and are put back there."""
    if not writes:
        return torch.compile(ref, dynamic=False)
    fresh = torch.compile(lambda **inputs: ref(**inputs)[len(writes) :], dynamic=False)

    def run(**inputs):
        new = fresh(**inputs)
        return (*(inputs[name] for name in writes), *new)

    return run


def _routed(fn: Callable, op: str, route: str) -> Callable:
    def run(**inputs):
        with paths(**{op: route}):
            return fn(**inputs)

    return run


# -- sizes -----------------------------------------------------------------------------------------------------------


class OnDevice(Make):
    """Large inputs, made where they are needed: a GPU takes milliseconds for what a core takes seconds for."""

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        fast = torch.Generator(self.device).manual_seed(int(torch.randint(1 << 40, (1,), generator=self.gen)))
        made = torch.randn(shape, generator=fast, device=self.device, dtype=dtype or self.dtype)
        return made.mul_(scale)


def smallest(case: Case) -> str:
    """The name of the smallest size that is not empty."""
    count = lambda name: sum(t.numel() for t in tensors(case.make(name, "meta", case.dtypes[-1])))
    return min((name for name in case.sizes if name != "empty"), key=count)


def guarded_size(case: Case) -> Size:
    """The production size, its first dimension cut where fp64 of it would not fit."""
    size = dict(case.sizes[PRODUCTION])
    if sum(t.numel() for t in tensors(case.make(PRODUCTION, "meta", case.dtypes[-1]))) > WHOLE:
        first = next(iter(size))
        size[first] = min(size[first], 2 if size[first] <= 64 else 4096)  # rows of tokens, or tokens
    return size


# -- measuring -------------------------------------------------------------------------------------------------------


def modes(case: Case, device: str | torch.device) -> list[str]:
    """What is timed of a case: "graph" is the forward as a replayed CUDA graph."""
    graph = ["graph"] * (case.op in GRAPHED and torch.device(device).type == "cuda")
    return ["forward", "backward", "both"] if case.grads else ["forward", *graph]


def amounts(case: Case, size: str, mode: str) -> tuple[float, float]:
    """(bytes, FLOPs) of the ideal kernels in a mode."""
    shape = case.sizes[size]
    nbytes = case.traffic(**shape, item=case.dtypes[-1].itemsize) if case.traffic else (0, 0)
    pick = {"backward": lambda pair: pair[1], "both": sum}.get(mode, lambda pair: pair[0])
    return pick(nbytes), pick(case.flops(**shape))


class Run:
    """A provider on a case's inputs. `prepare(mode)` before every `call(mode)`; only the call is timed."""

    def __init__(self, case: Case, provider: Provider, inputs: Inputs):
        self.provider, self.inputs = provider, inputs
        self.written = {name: inputs[name] for name in provider.writes}
        self.kept = copies(self.written)
        self.leaves = [find(inputs, path) for path in case.grads]
        self.grad_of = self.outs = self.replay = None

    def prepare(self, mode: str) -> None:
        """Inputs as new ones, and for "backward" a graph to go back through."""
        refill(self.written, self.kept)
        touch(self.inputs)
        if mode == "backward":
            self.outs = self._forward()
        if self.leaves and mode != "forward" and self.grad_of is None:
            outs = self.outs or self._forward()
            self.grad_of = [torch.randn_like(o) if o.requires_grad else None for o in outs]
        if mode == "graph" and self.replay is None:
            self.replay = graphed(self._forward)

    def call(self, mode: str) -> None:
        if mode == "graph":
            self.replay()
        elif mode == "backward":
            self._backward(self.outs)
            self.outs = None
        elif mode == "both":
            self._backward(self._forward())
        else:
            self._forward()

    def _forward(self) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.requires_grad_(True)
        return outputs(self.provider.fn(**self.inputs))

    def _backward(self, outs: list[Tensor]) -> None:
        pairs = [(o, g) for o, g in zip(outs, self.grad_of, strict=True) if g is not None]
        torch.autograd.grad([o for o, _ in pairs], self.leaves, [g for _, g in pairs])


@dataclass(frozen=True)
class Failure:
    """What kept a provider from being timed: text, because an exception would keep its tensors alive."""

    reason: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        return cls(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


Found = dict[tuple[str, str], Timing | Failure]  # (mode, provider)


def measure(
    case: Case, names: list[str], size: str, *, device: str | torch.device, rounds: int, min_ms: float = 20.0
) -> Found:
    """Times of the named providers in every mode of the case, or what kept one from being timed."""
    torch._dynamo.reset()  # references are shared by cases, and Dynamo gives up after 8 recompilations
    dtype, found, ready = case.dtypes[-1], {}, {}
    make = OnDevice if torch.device(device).type == "cuda" and size == PRODUCTION else Make
    inputs = case.inputs(make(str(device), dtype), **case.sizes[size])
    for name in names:
        try:
            ready[name] = Run(case, guarded(name, case, size, device, dtype), inputs)
        except Exception as error:
            found |= {(mode, name): Failure.of(error) for mode in modes(case, device)}
    for mode in modes(case, device):
        runs, failed = _try(ready, mode)
        found |= {(mode, name): failure for name, failure in failed.items()}
        calls = {name: partial(run.call, mode) for name, run in runs.items()}
        prepare = lambda name, runs=runs, mode=mode: runs[name].prepare(mode)
        times = time_interleaved(calls, device=device, rounds=rounds, min_ms=min_ms, prepare=prepare)
        found |= {(mode, name): timing for name, timing in times.items()}
    return found


def guarded(name: str, case: Case, size: str, device: str | torch.device, dtype: torch.dtype) -> Provider:
    """The provider, once it has passed `guard` at a size that fits."""
    provider = build(name, case)
    shape = guarded_size(case) if size == PRODUCTION else case.sizes[size]
    cut = replace(case, sizes={"guarded": shape})
    poison = name != "torch.compile"
    guard(cut, provider.fn, "guarded", device=device, dtype=dtype, writes=provider.writes, poison=poison)
    return provider


def _try(ready: dict[str, Run], mode: str) -> tuple[dict[str, Run], dict[str, Failure]]:
    """One call of each at full size: (those that work, what the others raised)."""
    failed = {}
    for name, run in ready.items():
        try:
            run.prepare(mode)
            run.call(mode)
        except Exception as error:
            run.outs, failed[name] = None, Failure.of(error)
    return {name: run for name, run in ready.items() if name not in failed}, failed
