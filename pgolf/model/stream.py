"""The residual stream with its last sum still open.

A block ends in a sum (its input plus what its MLP adds) and the next one begins with another (that, a skip, and x0,
each with a weight per channel). Taken together they are one sum of up to four terms, one pass over memory instead of
three; per-channel weights multiply out among themselves. So blocks hand on terms and weights, not the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pgolf.kernels.residual import MAX_TERMS, residual, residual_kept


@dataclass(frozen=True)
class Stream:
    """sum_i weights[i] * terms[i]: terms (B, T, D); weights None (1), (D,) or 0-D, fp32."""

    terms: tuple[Tensor, ...]
    weights: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, x: Tensor) -> Stream:
        """The stream that is x."""
        return cls((x,), (None,))

    def plus(self, term: Tensor, weight: Tensor | None) -> Stream:
        """With weight * term added. A stream that has no room for it is summed first."""
        base = self if len(self.terms) < MAX_TERMS else Stream.of(self.sum())
        return Stream((*base.terms, term), (*base.weights, weight))

    def times(self, weight: Tensor) -> Stream:
        """Every term's weight times `weight`. Terms that shared a weight share the product, and so one gradient."""
        products = {id(w): weight if w is None else w * weight for w in self.weights}
        return Stream(self.terms, tuple(products[id(w)] for w in self.weights))

    def sum(self) -> Tensor:
        """(B, T, D)."""
        return residual(self.terms, self.weights, normalize=False)[0]

    def normed(self, eps: float, norm_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(sum, RMS norm of the sum times norm_scale)."""
        return residual(self.terms, self.weights, norm_scale=norm_scale, eps=eps)

    def mixed(self, mix: Tensor, x0: Tensor, mix0: Tensor, *, keep: bool, eps: float, norm_scale: float):
        """(the sum, or None without `keep`; u = mix * sum + mix0 * x0; RMS norm of u times norm_scale).

        With `keep` the sum is written on the way: one pass, where summing first would read it once more.
        """
        if not keep:
            return None, *self.times(mix).plus(x0, mix0).normed(eps, norm_scale)
        terms, weights = (*self.terms, x0), (*self.weights, mix0)
        return residual_kept(terms, weights, mix, inner=len(self.terms), eps=eps, norm_scale=norm_scale)
