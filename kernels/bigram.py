"""bigram: the front of the network in one pass: token embedding, hashed n-gram rows, RMS norm, smear.

    x_t = tok[id_t] + rows[h2(t)] (+ rows[h3(t)]) (+ extra_t)
    x_t = x_t / sqrt(mean(x_t^2) + eps)
    x_t <- (1 - G) x_t + G x_{t-1},  G = sigmoid(gate), x_{-1} = 0          if gate is given

`rows` (N, D) is the hash table already projected to the model's width and scaled: projecting the table (N = 2,048) and
not the tokens (98,304 a step) does the same sum with 1/48 of the work. ids (B, T) int64 -> (B, T, D) in tok's dtype.
Hashes, int32 semantics, exact for ids < 41,700 (id * 51,497 < 2^31):
    xor      h2 = (36313 x_t ^ 27191 x_{t-1}) mod (N-1), N-1 at position 0
             h3 = (36313 x_t ^ 27191 x_{t-1} ^ 51497 x_{t-2}) mod (N-1), N-1 at positions 0 and 1
    mul1009  h2 = (1009 x_{t-1} + x_t) mod N, x_{-1} = 0
Sources: the challenge's records PR #401 (xor), the gated-MLP family of the same fork (mul1009), PR #609 (trigram).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .residual import rms_norm


def shifted(ids: Tensor, by: int) -> Tensor:
    """ids (B, T) moved right by `by` positions, zeros entering."""
    return F.pad(ids, (by, 0))[:, : ids.shape[1]]


def bigram_index(ids: Tensor, rows: int, hash: str = "xor") -> Tensor:
    """(B, T) int64 row of each position's bigram in a table of `rows` rows."""
    previous = shifted(ids, 1)
    if hash == "mul1009":
        return (1009 * previous + ids) % rows
    index = ((36313 * ids) ^ (27191 * previous)) % (rows - 1)
    index[:, :1] = rows - 1
    return index


def trigram_index(ids: Tensor, rows: int) -> Tensor:
    """(B, T) int64 row of each position's trigram in the bigrams' table."""
    index = ((36313 * ids) ^ (27191 * shifted(ids, 1)) ^ (51497 * shifted(ids, 2))) % (rows - 1)
    index[:, :2] = rows - 1
    return index


def bigram_ref(
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None = None,
    *,
    hash: str = "xor",
    trigram: bool = False,
    extra: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 2.0**-23,
) -> Tensor:
    """Reference of `bigram`, in plain torch."""
    x = F.embedding(ids, token_table)
    if rows is not None:
        x = x + F.embedding(bigram_index(ids, rows.shape[0], hash), rows)
        if trigram:
            x = x + F.embedding(trigram_index(ids, rows.shape[0]), rows)
    if extra is not None:
        x = x + extra
    x = rms_norm(x, eps)
    if gate is not None:
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        x = torch.lerp(x, previous, torch.sigmoid(gate).to(x.dtype))
    return x


def bigram(
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None = None,
    *,
    hash: str = "xor",
    trigram: bool = False,
    extra: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 2.0**-23,
) -> Tensor:
    """See the module's contract. Raises ValueError on shapes, dtypes or hash names that do not fit."""
    dim = token_table.shape[1]
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"bigram: ids {tuple(ids.shape)} {ids.dtype}, expected (B, T) torch.int64")
    for name, t in (("rows", rows), ("extra", extra), ("gate", gate)):
        if t is not None and t.shape[-1] != dim:
            raise ValueError(f"bigram: {name} {tuple(t.shape)}, expected a last axis of {dim}")
    if hash not in ("xor", "mul1009") or (trigram and (hash != "xor" or rows is None)):
        raise ValueError(f"bigram: hash {hash!r}, trigram {trigram}: expected xor, or mul1009 without trigram")
    return bigram_ref(ids, token_table, rows, hash=hash, trigram=trigram, extra=extra, gate=gate, eps=eps)
