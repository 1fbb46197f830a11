"""Low-rank affine regression in closed form, from streamed sums.

Shapes: P pairs (tokens), F features, D targets. All sums are those of the rows [z, 1, y].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# What one regression of F features on D = F / 2 targets takes, in F F numbers of fp64: the moments
# of both kinds of pairs, and what `fits` has at once. LAPACK's own for eigenvectors comes on top.
MATRICES = 11

# Strengths of the ridge, as shares of each feature's own variance.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


class Moments:
    """Sums over pairs of features and targets: everything that a regression needs of them.

    They are of what the pairs differ by from the first ones' mean, so that features which hardly
    vary lose no digits.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        size = features + 1 + targets
        self.features = features
        self.offset = torch.zeros(size, dtype=torch.float32, device=device)
        self.sums = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, z_PF: torch.Tensor, y_PD: torch.Tensor) -> None:
        """Adds pairs."""
        one = torch.ones_like(z_PF[:, :1])
        rows = torch.cat([z_PF, one, y_PD], dim=1).float()
        if not self.pairs:
            self.offset = rows.mean(0)
            self.offset[self.features] = 0
        rows -= self.offset
        self.sums += rows.T @ rows  # as fp64

    @property
    def pairs(self) -> float:
        """How many pairs there are."""
        return float(self.sums[self.features, self.features])

    @property
    def energy(self) -> float:
        """The sum of the targets' squares."""
        zero = torch.zeros_like(self.sums[0])
        f = self.features
        return float(self.about(zero[:f], zero[f + 1 :])[2])

    def about(
        self, z_F: torch.Tensor, y_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """zz (FF), zy (FD) and the trace of yy, of features and targets less these."""
        f, count = self.features, self.pairs
        sum_z, sum_y = self.sums[f, :f], self.sums[f, f + 1 :]
        z_F, y_D = z_F - self.offset[:f], y_D - self.offset[f + 1 :]
        zz = self.sums[:f, :f] - torch.outer(sum_z, z_F) - torch.outer(z_F, sum_z)
        zy = self.sums[:f, f + 1 :] - torch.outer(sum_z, y_D) - torch.outer(z_F, sum_y)
        yy = self.sums.diagonal()[f + 1 :].sum() - 2 * sum_y @ y_D + count * y_D @ y_D
        return zz + count * torch.outer(z_F, z_F), zy + count * torch.outer(z_F, y_D), yy

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean features and the mean targets."""
        f = self.features
        mean = self.offset + self.sums[f] / self.pairs
        return mean[:f], mean[f + 1 :]


@dataclass(frozen=True)
class Affine:
    """y = V (A z) + b: `down` (RF) is A, `up` (DR) is V, `bias` (D) is b."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def __call__(self, z_PF: torch.Tensor) -> torch.Tensor:
        """The prediction, in the type of `z_PF`."""
        down, up, bias = (m.to(z_PF.dtype) for m in (self.down, self.up, self.bias))
        return z_PF @ down.T @ up.T + bias


@dataclass(frozen=True)
class Fit:
    """Reduced-rank regressions of every rank up to R: the first rows and columns for each.

    `errors` are the sums of squared errors on held-out pairs, by rank from 0 (the bias alone).
    """

    down: torch.Tensor  # (R, F)
    up: torch.Tensor  # (D, R), orthonormal columns, the best first
    mean_z: torch.Tensor
    mean_y: torch.Tensor
    errors: torch.Tensor  # (R + 1)

    def affine(self, rank: int) -> Affine:
        """The regression of one rank."""
        down, up = self.down[:rank], self.up[:, :rank]
        return Affine(down, up, self.mean_y - up @ (down @ self.mean_z))


def fits(
    train: Moments, held_out: Moments, rank: int, ridges: Iterable[float] = RIDGES
) -> list[Fit]:
    """The reduced-rank ridge regressions of all ranks up to one, for each strength of the ridge.

    Of all maps of a rank, that with the least squared error plus ridge (Mukherjee & Zhu 2011,
    "Reduced rank ridge regression"): the full one, projected on the leading eigenvectors of its
    predictions' second moments. What is returned is R (F + D) numbers for each strength; some
    multiples of F F are needed meanwhile (`MATRICES`).
    """
    z_F, y_D = train.means()
    zz, zy, _ = train.about(z_F, y_D)
    scale = zz.diagonal().clamp(min=1e-12 * float(zz.diagonal().max()) + 1e-30).rsqrt()
    values, vectors = torch.linalg.eigh(zz.mul_(scale[:, None]).mul_(scale))
    del zz
    rotated = vectors.T @ (scale[:, None] * zy)
    test_zz, test_zy, test_yy = held_out.about(z_F, y_D)
    found = []
    for ridge in ridges:
        shrunk = rotated / (values.clamp(min=0) + ridge)[:, None]
        weights = scale[:, None] * (vectors @ shrunk)
        _, directions = torch.linalg.eigh(rotated.T @ shrunk)
        up = directions.flip(1)[:, :rank].contiguous()  # no view, which would keep the rest
        predicted = weights @ up
        gains = 2 * (predicted * (test_zy @ up)).sum(0)
        gains -= (predicted * (test_zz @ predicted)).sum(0)
        errors = test_yy - torch.cat([gains.new_zeros(1), gains.cumsum(0)])
        found.append(Fit(predicted.T, up, z_F, y_D, errors))
    return found


def best(candidates: Sequence[Sequence[Fit]], rank: int) -> Sequence[Fit]:
    """Of fits of several targets (one sequence per strength), the strength that errs least."""
    return min(candidates, key=lambda fs: sum(float(f.errors[rank]) for f in fs))
