"""Moments of rows that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor


class CentredMoments:
    """Sums of rows and of their products, about any centre near the rows' mean.

    Float32 products of centred values keep their digits. What is summed over parts is float64.
    """

    def __init__(self, centre: Tensor) -> None:
        """Start with no rows; ``centre`` is (F,) float32."""
        self.centre, self.count = centre, 0
        self._sum = torch.zeros(len(centre), dtype=torch.float64)
        self._products: list[Tensor] = []

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
            self._products = [torch.zeros(size, o.shape[1], dtype=torch.float64) for o in others]
        for at, other in enumerate(others):
            self._products[at] += (rows.T @ other).double()

    @property
    def mean(self) -> Tensor:
        """(F,) float64, of the rows less the centre."""
        return self._sum / self.count

    def covariance(self, at: int, mean: Tensor) -> Tensor:
        """(F, K) float64, of the rows and one of the others, whose (K,) mean is given."""
        return self._products[at] / self.count - torch.outer(self.mean, mean)
