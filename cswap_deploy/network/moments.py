"""Moments of rows that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKED = 128
"""Rows so wide are multiplied with themselves in blocks: it takes five eighths of the products."""
_BLOCKS = 4


class CentredMoments:
    """Sums of rows and of their products, about any centre near the rows' mean.

    Float32 products of centred values keep their digits. What is summed over parts is float64.
    """

    def __init__(self, centre: Tensor) -> None:
        """Start with no rows; ``centre`` is (F,) float32."""
        self.centre, self.count = centre, 0
        self._sum = centre.new_zeros(len(centre), dtype=torch.float64)
        self._products: list[Tensor] = []
        self._own: list[bool] = []
        """Which of them are of the rows with themselves: their lower half is not summed."""

    def add(self, rows: Tensor, *others: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Count rows in.

        Args:
            rows: (R, F) float32, less the centre.
            others: (R, K) each: what the rows are multiplied with, in the same order in each call.
            dtype: In which one part's rows are added up.
        """
        self.count += len(rows)
        self._sum += rows.sum(0, dtype=dtype)
        size = len(self.centre)
        if not self._products:
            self._products = [
                rows.new_zeros(size, other.shape[1], dtype=torch.float64) for other in others
            ]
            self._own = [other is rows for other in others]
        for at, other in enumerate(others):
            if other is rows:
                _add_upper(self._products[at], rows)
            else:
                self._products[at] += (rows.T @ other).double()

    @property
    def mean(self) -> Tensor:
        """(F,) float64, of the rows less the centre."""
        return self._sum / self.count

    def covariance(self, at: int, mean: Tensor) -> Tensor:
        """(F, K) float64, of the rows and one of the others, whose (K,) mean is given."""
        product = self._products[at]
        if self._own[at]:
            product = product.triu() + product.triu(1).T
        return product / self.count - torch.outer(self.mean, mean)


def _add_upper(product: Tensor, rows: Tensor) -> None:
    """Add rows' own product, in place: the upper half, and a part of the lower one."""
    size = len(product)
    step = size if size < _BLOCKED else -(-size // _BLOCKS)
    for begin in range(0, size, step):
        part = slice(begin, begin + step)
        product[part, begin:] += (rows[:, part].T @ rows[:, begin:]).double()
