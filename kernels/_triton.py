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


@jit
def described(t, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """t itself if it is a descriptor; else one that becomes plain addresses, on a GPU that has no TMA: there a host's
    descriptor would compile to scalar loads without a pipeline. cols must be a multiple of 16 bytes."""
    if isinstance(t, tl.tensor_descriptor):
        return t
    else:
        # said like this, the compiler knows of the multiple too and takes 128-bit loads
        packed: tl.constexpr = 128 // t.dtype.element_ty.primitive_bitwidth
        cols = cols // packed * packed
        return tl.make_tensor_descriptor(t, [rows, cols], [cols, 1], [ROWS, COLS])
