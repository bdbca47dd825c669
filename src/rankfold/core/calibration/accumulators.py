"""How each statistic is accumulated, batch by batch."""

from typing import Any

import torch
from torch import Tensor

from rankfold.core.linalg import leading_svd

_STRIP = 256  # columns; narrower ones make the products slower


class Accumulator:
    """What grows batch by batch: `add` a matrix, then `result(batches)` names the tensors of the statistic."""

    def add(self, X: Tensor) -> None:
        raise NotImplementedError

    def end_batch(self) -> None:
        """All matrices of a batch have been added."""

    def result(self, batches: int) -> dict[str, Tensor]:
        raise NotImplementedError


class CovarianceAccumulator(Accumulator):
    """The upper triangle of XᵀX, in strips: a matrix product of the whole would take almost twice as long."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        n = X.shape[1]
        self.total = X.new_zeros(n, n) if self.total is None else self.total
        for begin in range(0, n, _STRIP):
            end = min(n, begin + _STRIP)
            self.total[begin:end, begin:].addmm_(X[:, begin:end].mT, X[:, begin:])
        self.tokens += X.shape[0]

    def result(self, batches: int) -> dict[str, Tensor]:
        upper: Any = self.total
        return {"value": (upper.triu() + upper.triu(1).mT) / self.tokens}


class SampleCovarianceAccumulator(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, X: Tensor) -> None:
        self.total = X.new_zeros(X.shape[1], X.shape[1]) if self.total is None else self.total
        largest = X.max().abs()
        X = X / torch.where(largest > 0, largest, X.abs().max().clamp(min=torch.finfo(X.dtype).tiny))
        self.total.addmm_(X.mT, X)
        self.samples += 1

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / self.samples}  # type: ignore[operator]


class SecondMomentAccumulator(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        squares = X.square().sum(0).to_dense()  # an embedding's one-hot X is sparse
        self.total = squares if self.total is None else self.total.add_(squares)
        self.tokens += X.shape[0]

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / self.tokens}  # type: ignore[operator]


class MagnitudeAccumulator(Accumulator):
    def __init__(self) -> None:
        self.total: Any = None
        self.largest: Any = None
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        sizes = X.abs()
        self.total = sizes.sum(0) if self.total is None else self.total.add_(sizes.sum(0))
        self.largest = sizes.amax(0) if self.largest is None else torch.maximum(self.largest, sizes.amax(0))
        self.tokens += X.shape[0]

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"mean": self.total / self.tokens, "largest": self.largest}


class MeanGradientAccumulator(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, X: Tensor) -> None:
        self.total = X.clone() if self.total is None else self.total.add_(X)

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / batches}  # type: ignore[operator]


class SquaredGradientAccumulator(Accumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.of_batch: Tensor | None = None

    def add(self, X: Tensor) -> None:
        self.of_batch = X if self.of_batch is None else self.of_batch + X

    def end_batch(self) -> None:
        if self.of_batch is not None:
            square, self.of_batch = self.of_batch.square(), None
            self.total = square if self.total is None else self.total.add_(square)

    def result(self, batches: int) -> dict[str, Tensor]:
        return {"value": self.total / batches}  # type: ignore[operator]


class IncrementalPCA(Accumulator):
    """With n tokens seen, mean μ, components V and singular values σ, a batch Y of m tokens with mean ν gives

        [diag(σ) V;  Y − ν;  √(nm / (n+m)) (μ − ν)]

    whose leading right singular vectors and values are the new V and σ (exactly so if no component was cut before).
    A batch of fewer tokens than components is used too; EVA's code skips it.
    """

    def __init__(self, components: int):
        self.k, self.tokens = components, 0
        self.rng = torch.Generator().manual_seed(0)
        self.mean: Any = None  # (in,)
        self.V: Any = None  # (k, in)
        self.sigma: Any = None  # (k,)
        self.squares: Any = 0.0  # Σ (x − μ)², over tokens and features
        self.cosines: Tensor | None = None  # (k,) of each component with the one before this batch

    @property
    def ratios(self) -> Tensor:
        return self.sigma.square() / torch.where(self.squares > 0, self.squares, 1).to(self.sigma)

    def add(self, X: Tensor) -> None:
        n, m = self.tokens, X.shape[0]
        mean = X.mean(0, dtype=torch.float64)
        X = (X - mean).to(X.dtype)
        self.squares = self.squares + X.square().sum(dtype=torch.float64)
        if n:
            shift = self.mean - mean
            self.squares = self.squares + n * m / (n + m) * shift.square().sum()
            X = torch.cat([self.sigma.unsqueeze(1) * self.V, X, (n * m / (n + m)) ** 0.5 * shift.to(X).unsqueeze(0)])
            mean = mean + n / (n + m) * shift
        old, (_, self.sigma, self.V) = self.V, leading_svd(X, self.k, self.rng)
        self.mean, self.tokens = mean, n + m
        if old is not None and len(old) == self.k:
            self.cosines = (old * self.V).sum(1)

    def result(self, batches: int) -> dict[str, Tensor]:
        return {
            "components": self.V,
            "ratios": self.ratios,
            "singular_values": self.sigma,
            "mean": self.mean.to(self.V),
        }
