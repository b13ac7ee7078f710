"""Repairs of Triton's CPU interpreter, for tests only. `tests/test_interp_shim.py` proves each; kernels rely on none.

Broken in triton 3.6 (and silently so, but for the first):
- numpy >= 2.4 refuses int() of 1-element arrays: every loop whose bound is a tensor raises TypeError.
- bf16 lives as uint16 bit patterns: products and sums work on the patterns, a cast from fp32 truncates.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
COMPARE = {np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
CASTS = ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui")


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(before):
    def cast_impl(self, src, dst):
        source, target = src.dtype.scalar, dst.scalar
        if (source == tl.bfloat16) == (target == tl.bfloat16):
            return before(self, src, dst)
        if source == tl.bfloat16:
            wide = Handle(widen(src.data), tl.float32)
            return wide if target == tl.float32 else before(self, wide, dst)
        wide = src.data if source == tl.float32 else before(self, src, tl.float32).data
        return Handle(narrow(wide), target)

    return cast_impl


def _fp_to_fp(before):
    def create_fp_to_fp(self, src, dst, rounding):
        nearest = rounding is None or "RTNE" in str(rounding)
        touches = is_bf16(src) or dst.scalar == tl.bfloat16
        if touches and nearest and dst.scalar.primitive_bitwidth >= 16:
            return self.cast_impl(src, dst)
        return before(self, src, dst, rounding)

    return create_fp_to_fp


def _binary(before):
    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) and is_bf16(rhs) and op not in BITWISE:
            out = op(widen(lhs.data), widen(rhs.data))
            return Handle(out, tl.int1) if op in COMPARE else Handle(narrow(out), tl.bfloat16)
        if op in COMPARE:  # a numpy scalar of a reduction has no dtype that later steps accept
            return Handle(np.asarray(op(lhs.data, rhs.data)), tl.int1)
        return before(self, lhs, rhs, op)

    return binary_op


def _dot(before):
    def create_dot(self, a, b, d, *rest):
        a, b = (Handle(widen(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return before(self, a, b, d, *rest)

    return create_dot


def _index(before):
    def patch(tensor, scope):
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    return patch


def install() -> None:
    """Repairs the interpreter of this process; again is harmless."""
    if getattr(Builder, "repaired_by_pgolf", False):
        return
    Builder.repaired_by_pgolf = True
    Builder.cast_impl = _cast(Builder.cast_impl)
    for name in CASTS:
        setattr(Builder, f"create_{name}", lambda self, src, dst: self.cast_impl(src, dst))
    Builder.create_fp_to_fp = _fp_to_fp(Builder.create_fp_to_fp)
    Builder.binary_op = _binary(Builder.binary_op)
    Builder.create_dot = _dot(Builder.create_dot)
    interpreter._patch_lang_tensor = _index(interpreter._patch_lang_tensor)
