"""What each parameter is, declared by the module that owns it.

Optimiser groups, storage dtype and bit-width are tables keyed by role. Nobody matches parameter names: a rename must
not move a parameter to another optimiser. A module class declares `roles = {"weight": Role.MATRIX}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn


class Role(Enum):
    MATRIX = "matrix"  # hidden 2-D weights of blocks: Muon
    SIDE_MATRIX = "side_matrix"  # projections of hashed and value embeddings: Muon or the scalar group
    EMBED = "embed"  # tables that are gathered from
    HEAD = "head"  # untied output head
    VECTOR = "vector"  # gains, scales, gates, mixes
    RESID_LAMBDA = "resid_lambda"  # learned scalars on the residual stream
    FROZEN = "frozen"  # declared, never trained (requires_grad is off)
    ADAPT_ONLY = "adapt_only"  # trained by nobody but test-time adaptation


@dataclass(frozen=True)
class ParamInfo:
    """One parameter: its name in the state dict, itself, its role and the block that owns it (None: no block)."""

    name: str
    param: nn.Parameter
    role: Role
    block: int | None


def roles_of(model: nn.Module) -> list[ParamInfo]:
    """Every parameter of `model` once, in `named_parameters` order. Raises TypeError on an undeclared one.

    A module may carry `block_index: int`; parameters below it belong to that block.
    """
    found: dict[str, tuple[Role, int | None]] = {}

    def walk(module: nn.Module, prefix: str, block: int | None) -> None:
        block = getattr(module, "block_index", block)
        declared = getattr(type(module), "roles", {})
        for name, param in module.named_parameters(recurse=False):
            if name not in declared:
                raise TypeError(f"{type(module).__name__}.{name} has no role: add it to the class's `roles` table")
            role = declared[name] if param.requires_grad else Role.FROZEN
            found[prefix + name] = (role, block)
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", block)

    walk(model, "", None)
    return [ParamInfo(n, p, *found[n]) for n, p in model.named_parameters()]
