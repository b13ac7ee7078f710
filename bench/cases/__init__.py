"""Every kernel, with inputs: one `Case` a variant. Tests, benchmarks and the static gate are parametrised from `CASES`.

One module an op, each with a list `CASES`. A case says how to make its inputs at a named size, how to call the op and
its reference, what is differentiable, and how many bytes and FLOPs the ideal kernel spends.
"""

from __future__ import annotations

import importlib
import pkgutil

from .case import Case, Make

CASES: list[Case] = [
    case
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "case")
    for case in importlib.import_module(f"{__name__}.{module}").CASES
]

__all__ = ["CASES", "Case", "Make"]
