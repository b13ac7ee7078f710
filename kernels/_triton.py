"""Triton where there is one. Without it (macOS, Windows, a bare CPU install) the ops run their references.

Kernel files import `triton`, `tl` and `jit` from here, and nothing else may import triton.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None


class Missing:
    """Stands for a kernel where triton is not installed."""

    def __init__(self, fn):
        self.fn, self.__name__ = fn, fn.__name__

    def __getitem__(self, grid):
        raise ValueError(f"{self.__name__}: got no triton, expected triton >= 3.5: pip install 'pgolf[cuda]'")


def jit(fn):
    """`triton.jit`; with TRITON_INTERPRET=1 set before the first import, the CPU interpreter's version of it."""
    return Missing(fn) if triton is None else triton.jit(fn)
