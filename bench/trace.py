"""One training step of a preset, traced on meta tensors: every product, kernel launch and other op, with its shapes.

Nothing is computed and no GPU is needed: ops of `kernels/` run their bodies on meta tensors, so that each launch and
each library product inside is seen, as on the GPU that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from pgolf.config import RunConfig
from pgolf.data.batch import Batch
from pgolf.dist import Dist, Pending, Rank
from pgolf.kernels._op import Recorded, paths, recording
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective
from pgolf.model.roles import roles_of
from pgolf.optim.groups import Group, build_groups
from pgolf.optim.muon import Muon
from pgolf.quant.weight_cast import WeightCast, bank_weights

SDPA = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
# ops that move nothing: new storage, and what is not marked as a view but is one here
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view", "reshape"}


@dataclass(frozen=True)
class Event:
    """Something that a GPU would do."""

    phase: str  # forward, backward, optimizer
    op: str  # the op of kernels/ it belongs to, "" for plain torch
    name: str  # kernel or aten op
    flops: int
    bytes: int  # inputs and outputs, each once
    shapes: str

    @property
    def is_product(self) -> bool:
        return self.flops > 0


class Trace(TorchDispatchMode):
    """Collects events; `watch` is entered around the body of each op of kernels/."""

    def __init__(self):
        super().__init__()
        self.events: list[Event] = []
        self.phase, self.op = "forward", ""
        self.recording: Any = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self._add(func, name, args, kwargs or {}, out)
        return out

    def _add(self, func, name: str, args, kwargs, out) -> None:
        count = flop_registry.get(func.overloadpacket)
        tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)]
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if name in SDPA:
            flops //= 2  # the registry counts all pairs, causal attention has half of them
        self.events.append(Event(self.phase, self.op, name, flops, total_bytes(tensors), shapes_of(tensors)))

    @contextmanager
    def watch(self, op: str) -> Iterator[None]:
        """Inside an op's body: its library calls are seen, and its launches become events in their place."""
        outer, seen = self.op, len(self.recording.launches)
        self.op = op
        with self:
            yield
        self.op = outer
        for one in self.recording.launches[seen:]:
            tensors = launch_tensors(one)
            event = Event(self.phase, op, short(one), launch_flops(one), total_bytes(tensors), shapes_of(tensors))
            self.events.append(event)


def short(one: Recorded) -> str:
    return one.kernel.__name__.strip("_").removesuffix("_kernel")


def launch_tensors(one: Recorded) -> list[Tensor]:
    """The tensors that a launch was given, descriptors opened."""
    bases = [getattr(a, "base", a) for a in one.args]
    return [t for t in bases if isinstance(t, Tensor)]


def total_bytes(tensors: list[Tensor]) -> int:
    """Bytes of distinct tensors; an expanded one counts what it stores."""
    distinct = {id(t): t for t in tensors}.values()
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in distinct)


def shapes_of(tensors: list[Tensor]) -> str:
    return " ".join("x".join(map(str, t.shape)) or "()" for t in tensors[:4])


# Products inside our own kernels, from a launch's arguments. Attention by the usual convention: causal counts half,
# and backward 2.5 times forward (our own backward recomputes the scores twice and does 3.5).
def _mlp(args) -> int:
    m, n, k = (a for a in args if isinstance(a, int))
    return 2 * m * n * k


def _attention(share: float) -> Callable:
    def flops(args) -> int:
        b, t, h, d = args[0].shape
        return int(share * 2 * b * t * t * h * d)

    return flops


def _gram(args) -> int:
    total, side, k = args[2], args[3], args[4]
    return total * side * k  # half of a full product: A is symmetric


def _poly(args) -> int:
    total, side = args[3], args[4]
    return total * side * side


LAUNCH_FLOPS: dict[str, Callable] = {
    "mlp_up": _mlp,
    "mlp_du": _mlp,
    "attention_fwd": _attention(1.0),
    "attention_dkdv": _attention(1.5),
    "attention_dq": _attention(1.0),
    "newton_schulz_gram": _gram,
    "newton_schulz_poly": _poly,
}


def launch_flops(one: Recorded) -> int:
    """Tensor-core FLOPs of a launch; 0 for kernels without products."""
    count = LAUNCH_FLOPS.get(short(one))
    return count(one.args) if count else 0


def share_rows(cfg: RunConfig, world_size: int = 8) -> int:
    """Rows of `seq_len` tokens of one of `world_size` GPUs in a step, rounded as the loader rounds; at least 1."""
    return max(1, cfg.data.batch_tokens // world_size // cfg.data.seq_len)


def trace_step(cfg: RunConfig, arch: int, path: str = "triton", world_size: int = 8) -> list[Event]:
    """Events of one GPU's share of a step: weight cast, forward, backward, Muon. path: "triton" or "reference"."""
    dtype, trace = torch.bfloat16, Trace()
    with torch.device("meta"):
        model = GPT(
            cfg.model,
            train_length=cfg.data.seq_len,
            compute_dtype=dtype,
            fold_scales=cfg.kernels.fold_scales and path == "triton",
        )
        ids = torch.empty((share_rows(cfg, world_size), cfg.data.seq_len), dtype=torch.int64)
    objective = Objective(cfg.loss, model, "meta")
    infos = roles_of(model)
    chosen = {} if path == "triton" else dict.fromkeys(cfg.kernels.ops(), "reference")
    with paths(**chosen), fused_sdpa(), recording(arch, watch=trace.watch) as rec:
        trace.recording, trace.phase = rec, "setup"
        groups = _muon_groups(cfg, infos)
        banks = bank_weights(model, infos, cfg.quant, [g.infos for g in groups])
        cast = WeightCast(model, infos, cfg.quant, dtype, banks) if path == "triton" else None
        muon = Muon(groups, cfg.optim.muon, OnPaper(world_size), banks)
        with trace:
            trace.phase = "optimizer"
            if cast:
                cast.refresh_()
            trace.phase = "forward"
            loss, _ = objective(Batch(ids, ids))
            trace.phase = "backward"
            loss.backward()
            trace.phase = "optimizer"
            if cast:
                cast.collect_()
            muon.update_()
    return [e for e in trace.events if e.phase != "setup"]


@contextmanager
def fused_sdpa() -> Iterator[None]:
    """On meta tensors torch takes attention apart into (T, T) products; inside, it is the one fused op of a GPU."""
    before = F.scaled_dot_product_attention

    def sdpa(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    F.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


class OnPaper(Dist):
    """Rank 0 of many that are not there: its share of the work is done, and nothing is sent."""

    def __init__(self, world_size: int):
        super().__init__(Rank(0, world_size, device=torch.device("meta")))

    def start_mean_(self, grads: list) -> Pending:
        return Pending()

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Pending:
        return Pending()

    def all_gather(self, full: Tensor, shard: Tensor) -> Pending:
        return Pending()


def _muon_groups(cfg: RunConfig, infos: list) -> list[Group]:
    """Muon's groups; AdamW has no meta kernel and is counted by the ledger."""
    layers = (cfg.model.plan.num_layers, cfg.model.plan.n_encoder)
    return [g for g in build_groups(infos, cfg.optim, layers, cfg.model.embed.tied) if g.kind == "muon"]
