"""Hessians of linear layers: the mean of x x^T over the inputs x that they see while batches go through the model.

An observer sits in a layer's adapter slot: fused regions call it, or fall back to their unfused form; a hook on the
module would see nothing of layers whose weights are read by a fused product. The projection of a table is another case:
its input is the whole table, whoever takes which row, so that its rows are counted by the tokens that take them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pgolf.data.batch import Batch
from pgolf.dist import Dist
from pgolf.model.embed import HashTable
from pgolf.model.features.value_embed import ValueTable
from pgolf.model.gpt import GPT
from pgolf.quant.weight_cast import linears_of


def gram(x: Tensor) -> Tensor:
    """x (..., C) -> sum of x x^T over all but the last axis, (C, C) fp32."""
    rows = x.flatten(0, -2).float()
    before = torch.get_float32_matmul_precision()
    if x.is_cuda and x.dtype is torch.bfloat16:
        # TF32 holds a bf16 number exactly: the same products, summed in fp32, at the speed of tensor cores
        torch.set_float32_matmul_precision("high")
    try:
        return rows.T @ rows
    finally:
        torch.set_float32_matmul_precision(before)


class Grams:
    """`gram` of the inputs of one batch; layers that share an input (q, k, v) share the product."""

    def __init__(self):
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = x, gram(x)
        return self.last[1]


class Observer(nn.Module):
    """In an adapter slot: adds x x^T to `total`, and nothing to the layer's output."""

    def __init__(self, total: Tensor, grams: Grams):
        super().__init__()
        self.total, self.grams, self.seen = total, grams, 0

    def forward(self, x: Tensor) -> Tensor:
        self.total += self.grams(x)
        self.seen += x.numel() // x.shape[-1]
        return x.new_zeros(())


class Hessians:
    """Of the weights `names` of `model`'s linear layers: `add` batches, `reduce_` over the ranks, read `of`.

    Sums are fp32 on the model's device.
    """

    def __init__(self, model: GPT, names: Iterable[str]):
        self.model, names, device = model, list(names), model.embed.weight.device
        tables, linears, grams = tables_of(model), linears_of(model), Grams()
        self.tables = {name: tables[name] for name in names if name in tables}
        self.layers = {name: linears[name] for name in names if name not in tables}
        square = lambda n: torch.zeros(n, n, device=device)
        self.observers = {n: Observer(square(layer.weight.shape[1]), grams) for n, layer in self.layers.items()}
        self.uses = {name: torch.zeros(len(t.table), device=device) for name, t in self.tables.items()}
        self.grams = grams

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """One forward of the model as it is, eager."""
        with self._observing():
            hidden = self.model.hidden(batch)
            if self.model.head is not None:
                self.model.logits(hidden)
        self.grams.last = None  # the input's memory
        for table, rows in table_rows(self.model, batch):
            for name in [n for n, t in self.tables.items() if t is table]:
                self.uses[name].index_add_(0, rows.flatten(), torch.ones_like(rows, dtype=torch.float32).flatten())

    def reduce_(self, dist: Dist) -> None:
        """Makes the sums those of all ranks."""
        for observer in self.observers.values():
            dist.all_reduce_sum_(observer.total)
            observer.seen = int(dist.all_reduce_sum_(torch.tensor(observer.seen)))
        for uses in self.uses.values():
            dist.all_reduce_sum_(uses)

    @torch.no_grad()
    def of(self, name: str) -> Tensor | None:
        """(C, C) fp32; None when the layer has seen no input."""
        if name in self.tables:
            uses, table = self.uses[name], self.tables[name].table.float()
            return (table * uses[:, None]).T @ table / uses.sum() if uses.any() else None
        observer = self.observers[name]
        return observer.total / observer.seen if observer.seen else None

    @contextmanager
    def _observing(self) -> Iterator[None]:
        for name, layer in self.layers.items():
            layer.adapter = self.observers[name]
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.adapter = None


def tables_of(model: GPT) -> dict[str, HashTable | ValueTable]:
    """Modules with a projected table, by the name of the projection's weight."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, HashTable | ValueTable))
    return {f"{name}.proj.weight": module for name, module in found}


def table_rows(model: GPT, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
    """Projected tables with the rows that the tokens of `batch` take from them; a table may come twice."""
    yield from model.embed.table_rows(batch.ids, batch.cu_seqlens)
    if model.value_table is not None:
        yield model.value_table, batch.ids
