"""Low-rank affine regression in closed form, from streamed sums.

Shapes: P pairs (tokens), F features, D targets. All sums are those of the rows [z, 1, y], each
counted as often as its pair weighs. Errors e count as e M e, by a metric M (DD).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# What one regression of D or 2D features (F) on D targets takes, in (F + D) (F + D) numbers of
# fp64: the moments of both kinds of pairs, and what `fits` has at once. LAPACK's own for
# eigenvectors comes on top.
MATRICES = 5

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

    def add(self, z_PF: torch.Tensor, y_PD: torch.Tensor, weight_P: torch.Tensor) -> None:
        """Adds pairs."""
        one = torch.ones_like(z_PF[:, :1])
        rows = torch.cat([z_PF, one, y_PD], dim=1).float()
        weight_P = weight_P.float()
        if not self.pairs:
            self.offset = weight_P @ rows / weight_P.sum()
            self.offset[self.features] = 0
        rows -= self.offset
        rows *= weight_P.sqrt()[:, None]
        self.sums += rows.T @ rows  # as fp64

    @property
    def pairs(self) -> float:
        """What all pairs weigh."""
        return float(self.sums[self.features, self.features])

    def energy(self, metric_DD: torch.Tensor) -> float:
        """What the targets count as errors."""
        zero = torch.zeros_like(self.sums[0])
        f = self.features
        return float((self.about(zero[:f], zero[f + 1 :])[2] * metric_DD).sum())

    def about(
        self, z_F: torch.Tensor, y_D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """zz (FF), zy (FD) and yy (DD), of features and targets less these."""
        f = self.features
        z, y = (slice(f), z_F - self.offset[:f]), (slice(f + 1, None), y_D - self.offset[f + 1 :])

        def products(a: tuple[slice, torch.Tensor], b: tuple[slice, torch.Tensor]) -> torch.Tensor:
            """One kind with another; in place, as these are large."""
            (of_a, less_a), (of_b, less_b) = a, b
            found = self.sums[of_a, of_b].clone()
            found.addr_(self.sums[f, of_a], less_b, alpha=-1)
            found.addr_(less_a, self.sums[f, of_b], alpha=-1)
            return found.addr_(less_a, less_b, alpha=self.pairs)

        return products(z, z), products(z, y), products(y, y)

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

    `errors` are the sums of errors on held-out pairs, by rank from 0 (the bias alone).
    """

    down: torch.Tensor  # (R, F)
    up: torch.Tensor  # (D, R), orthonormal columns by the metric, the best first
    mean_z: torch.Tensor
    mean_y: torch.Tensor
    errors: torch.Tensor  # (R + 1)

    def affine(self, rank: int) -> Affine:
        """The regression of one rank."""
        down, up = self.down[:rank], self.up[:, :rank]
        return Affine(down, up, self.mean_y - up @ (down @ self.mean_z))


def fits(
    train: Moments,
    held_out: Moments,
    rank: int,
    metric_DD: torch.Tensor,
    ridges: Iterable[float] = RIDGES,
) -> list[Fit]:
    """The reduced-rank ridge regressions of all ranks up to one, for each strength of the ridge.

    Of all maps of a rank, that with the least error plus ridge (Mukherjee & Zhu 2011, "Reduced
    rank ridge regression"): the full one, projected on the leading eigenvectors of its predictions'
    second moments, where targets were multiplied by the metric's root, and brought back. What is
    returned is R (F + D) numbers for each strength; some multiples of (F + D) (F + D) are needed
    meanwhile (`MATRICES`).
    """
    z_F, y_D = train.means()
    values, vectors = torch.linalg.eigh(metric_DD.double())
    values = values.clamp(min=1e-6 * float(values[-1]))  # what rounding leaves of nothing
    to, back = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
    zz, zy, _ = train.about(z_F, y_D)
    scale = zz.diagonal().clamp(min=1e-12 * float(zz.diagonal().max()) + 1e-30).rsqrt()
    values, vectors = torch.linalg.eigh(zz.mul_(scale[:, None]).mul_(scale))
    del zz
    rotated = vectors.T @ (zy.mul_(scale[:, None]) @ to)
    del zy
    test_zz, test_zy, test_yy = held_out.about(z_F, y_D)
    test_zy, before = test_zy @ to, (test_yy * metric_DD).sum()
    del test_yy
    found = []
    for ridge in ridges:
        shrunk = rotated / (values.clamp(min=0) + ridge)[:, None]
        weights = scale[:, None] * (vectors @ shrunk)
        _, directions = torch.linalg.eigh(rotated.T @ shrunk)
        up = directions.flip(1)[:, :rank].contiguous()  # no view, which would keep the rest
        predicted = weights @ up
        gains = 2 * (predicted * (test_zy @ up)).sum(0)
        gains -= (predicted * (test_zz @ predicted)).sum(0)
        errors = before - torch.cat([gains.new_zeros(1), gains.cumsum(0)])
        found.append(Fit(predicted.T, back @ up, z_F, y_D, errors))
    return found


def best(candidates: Sequence[Sequence[Fit]], rank: int) -> Sequence[Fit]:
    """Of fits of several targets (one sequence per strength), the strength that errs least."""
    return min(candidates, key=lambda fs: sum(float(f.errors[rank]) for f in fs))
