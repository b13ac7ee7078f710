"""EGGROLL: a search among the integers of an export, without gradients (PR #1156, moved to where it is allowed).

A trial takes one quantised tensor and `indices` of its entries, drawn without replacement, and scores all of them one
step up, then one step down, each held to its tensor's own range. The better one stays if it beats the weights as they
are. Scored are sequences of the training stream; the source took validation tokens before they were scored, on one
rank, after packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.data.loaders import Loader, Prefetcher
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.quant.config import EggrollConfig
from pgolf.quant.grid import GRIDS, Grid
from pgolf.quant.records import Record, dequantize


@dataclass
class Entries:
    """One quantised tensor: integers (n,) int8, the step of each row, the range, and the parameter behind it, (n,)."""

    q: Tensor
    step: Tensor
    grid: Grid
    param: Tensor

    def put_(self, places: Tensor, q: Tensor) -> None:
        """Sets the entries at `places` (k,) to the integers `q` (k,), in the model as well."""
        self.q[places] = q.to(torch.int8)
        self.param[places] = (q * self.step[places // (len(self.q) // len(self.step))]).to(self.param.dtype)


@dataclass(frozen=True)
class Outcome:
    """How many trials there were, how many stayed, and the loss before and after on the sequences that decided."""

    trials: int
    kept: int
    before: float
    after: float


def exported(model: GPT, records: Sequence[Record]) -> GPT:
    """A model of the same kind, on the same device, with the weights that `records` hold."""
    lengths = {"train_length": model.train_length, "max_length": model.max_length}
    out, weights = GPT(model.cfg, **lengths, compute_dtype=model.compute_dtype), dequantize(list(records))
    with torch.no_grad():
        for name, param in out.named_parameters():
            param.copy_(weights[name])
    return out.to(model.embed.weight.device).eval()


def take(loader: Loader | Prefetcher, rows: int) -> Batch:
    """The loader's next `rows` rows, of as many batches as that takes."""
    parts = [loader.next_batch()]
    while sum(len(p.ids) for p in parts) < rows:
        parts.append(loader.next_batch())
    return Batch(*(torch.cat([getattr(p, name) for p in parts])[:rows] for name in ("ids", "targets")))


@torch.no_grad()
def mean_loss(model: GPT, batch: Batch, dist: Dist) -> float:
    """Nats per token over all ranks' batches: the same bits on each. A collective."""
    nll = model(batch)[0]
    sums = torch.stack([nll.sum(dtype=torch.float64), nll.new_full((), nll.numel(), dtype=torch.float64)])
    total, count = dist.all_reduce_sum_(sums).tolist()
    return dist.broadcast_float(total / count)


def entries_of(model: GPT, records: Sequence[Record]) -> dict[str, Entries]:
    """The quantised ones among `records`, which `model` has been loaded with, by name."""
    params, out = dict(model.named_parameters()), {}
    for record in records:
        if record.kind in GRIDS and record.parts.keys() == {"q", "scale"}:
            flat = params[record.name].data.view(-1)
            q, step = (torch.from_numpy(record.parts[part]).to(flat.device) for part in ("q", "scale"))
            out[record.name] = Entries(q.flatten().clone(), step.float(), GRIDS[record.kind], flat)
    return out


@torch.no_grad()
def search(
    tensors: Sequence[Entries], loss: Callable[[], float], go_on: Callable[[], bool], cfg: EggrollConfig, seed: int
) -> Outcome:
    """Changes `tensors` and the model behind them, one after the other, as long as `go_on`.

    loss() and go_on() must say the same on every rank: all of them then decide alike. The draws depend on `seed` only.
    """
    gen = torch.Generator().manual_seed(seed)
    first = current = loss()
    trials = kept = 0
    while tensors and go_on() and not 0 < cfg.probes <= trials:
        one = tensors[trials % len(tensors)]
        places = torch.randperm(len(one.q), generator=gen)[: cfg.indices].to(one.q.device)
        before, scores = one.q[places].int(), []
        moved = [(before + by).clamp(one.grid.low, one.grid.high) for by in (1, -1)]
        for q in moved:
            one.put_(places, q)
            scores.append(loss())
        best = min(scores)
        if scores[0] != scores[1] and best < current:
            one.put_(places, moved[scores.index(best)])
            current, kept = best, kept + 1
        else:
            one.put_(places, before)
        trials += 1
    return Outcome(trials, kept, first, current)


def with_integers(records: Sequence[Record], tensors: dict[str, Entries]) -> list[Record]:
    """`records` with the integers that the search has left."""
    changed = lambda r: {**r.parts, "q": tensors[r.name].q.view(r.shape).cpu().numpy()}
    return [replace(r, parts=changed(r)) if r.name in tensors else r for r in records]
