"""What a reconstruction of producers multiplies with: what units read, and what is read of them.

Both are linear maps, with their transposes; neither is written out as a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_AT_ONCE = 4096
"""Rows that are multiplied at once."""
_ROWS = 16_384
"""For the covariance that preconditions."""

Solve = Callable[[Tensor], Tensor]
"""(k, F) -> (k, F)."""


class Linear(Protocol):
    """What the k units of a producer read at some rows, as a linear map of their weights."""

    def __call__(self, weight: Tensor) -> Tensor:
        """(k, F) weights -> (n, k) what they give at all rows."""

    def adjoint(self, given: Tensor) -> Tensor:
        """(n, k) -> (k, F), over the first n rows."""

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """What solves with the damped covariance of the first rows, and their mean variance.

        The damping is a part of that variance, which is () or (k,).
        """


@dataclass(frozen=True, slots=True)
class SharedInputs:
    """All units read the same: (n, F)."""

    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return self.values @ weight.T

    def adjoint(self, given: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return given.T @ self.values[: len(given)]

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """See :class:`Linear`."""
        factor, variance = _factored(self.values[: rows : max(1, rows // _ROWS)], ridge)
        return lambda g: torch.cholesky_solve(g.T.double(), factor).T.float(), variance


@dataclass(frozen=True, slots=True)
class OwnInputs:
    """Each unit reads an input of its own: (F, n, k)."""

    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """See :class:`Linear`."""
        found = self.values[0] * weight[:, 0]
        for tap, values in enumerate(self.values[1:], 1):
            found.addcmul_(values, weight[:, tap])
        return found

    def adjoint(self, given: Tensor) -> Tensor:
        """See :class:`Linear`."""
        return torch.stack([(v[: len(given)] * given).sum(0) for v in self.values], 1)

    def preconditioner(self, rows: int, ridge: float) -> tuple[Solve, Tensor]:
        """See :class:`Linear`."""
        some = self.values[:, : rows : max(1, rows // _ROWS)].permute(2, 1, 0)
        factor, variance = _factored(some, ridge)
        return (
            lambda g: torch.cholesky_solve(g[..., None].double(), factor)[..., 0].float(),
            variance,
        )


def _factored(rows: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(..., n, F) rows -> the Cholesky factor of their damped covariance, and its mean variance."""
    rows = rows - rows.mean(-2, keepdim=True)
    covariance = (rows.mT @ rows).double() / rows.shape[-2]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    variance = diagonal.mean(-1).clamp_min(1e-20)
    diagonal.add_(ridge * variance[..., None])
    return torch.linalg.cholesky(covariance), variance.float()


@dataclass(frozen=True, slots=True)
class Through:
    """How a consumer with S taps reads U positions of k units, at r positions of its own."""

    index: Tensor
    """(r, S) which of the U each tap reads."""
    exists: Tensor
    """(r, S) 1 or 0: outside the picture the consumer reads its own padding."""
    read: Tensor
    """(S, k, O), the consumer's weights."""

    def __call__(self, h: Tensor) -> Tensor:
        """(U, k) what it reads -> (r, O) what it gives, without its constant."""
        mixing = self.read.flatten(0, 1)
        return torch.cat([self._seen(h, part) @ mixing for part in self._parts(len(self.index))])

    def adjoint(self, given: Tensor, positions: int) -> Tensor:
        """(n, O) at the first n positions of its own -> (positions, k)."""
        mixing = self.read.flatten(0, 1).T
        found = given.new_zeros(positions, self.read.shape[1])
        for part in self._parts(len(given)):
            back = (given[part] @ mixing).view(-1, *self.read.shape[:2])
            back *= self.exists[part, :, None]
            found.index_add_(0, self.index[part].flatten(), back.flatten(0, 1))
        return found

    def reach(self, positions: int, rows: int) -> Tensor:
        """(positions, k) how far its outputs at the first rows move with each, squared."""
        counts = self.read.new_zeros(positions, self.read.shape[0])
        taps = torch.arange(len(self.read), device=counts.device).expand(rows, -1)
        counts.index_put_((self.index[:rows], taps), self.exists[:rows], accumulate=True)
        return counts @ self.read.square().sum(2)

    def _seen(self, h: Tensor, part: slice) -> Tensor:
        found = h.index_select(0, self.index[part].flatten())
        return (found.view(*self.index[part].shape, -1) * self.exists[part, :, None]).flatten(1)

    def _parts(self, rows: int) -> Iterator[slice]:
        for begin in range(0, rows, _AT_ONCE):
            yield slice(begin, min(begin + _AT_ONCE, rows))
