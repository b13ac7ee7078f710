"""AdamW for everything that is not a hidden matrix: tables, head, vectors, scalars."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pgolf.optim.groups import Group


def make_adamw(groups: Sequence[Group]) -> torch.optim.AdamW:
    """One fused AdamW over `groups`, which must all be of kind "adamw".

    Moments have the parameter's dtype: bf16 for bf16 tables. Decay is decoupled and follows the scheduled rate.
    Fused on CPU too: on one core a step of 37 vectors takes 0.34 ms, against 1.5 ms foreach and 2.9 ms one by one; with
    a 1024x512 table 0.58, 2.3 and 7.7 ms.
    """
    torch_groups = [
        {
            "params": g.params,
            "lr": g.lr,
            "betas": g.betas,
            "eps": g.eps,
            "weight_decay": g.weight_decay,
        }
        for g in groups
    ]
    return torch.optim.AdamW(torch_groups, fused=True)
