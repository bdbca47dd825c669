"""What can be asked of a calibration: each statistic is a value, and a new one is a subclass of `Statistic`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rankfold.core.calibration.accumulators import (
    Accumulator,
    CovarianceAccumulator,
    IncrementalPCA,
    MagnitudeAccumulator,
    MeanGradientAccumulator,
    SampleCovarianceAccumulator,
    SecondMomentAccumulator,
    SquaredGradientAccumulator,
)
from rankfold.core.delta import Site
from rankfold.errors import RankfoldError

T = TypeVar("T")
STATISTICS: dict[str, type["Statistic[Any]"]] = {}


class Statistic(Generic[T]):
    """A question about one site; its answer is a T. Subclasses are frozen dataclasses, so equal questions are shared.

    Statistics of inputs get, batch by batch, the tokens' inputs `X (tokens, in)`; those with `of_gradient` get each
    use's gradient `G (out, in)`. Both come in the site's dtype (float32, or float64 for a float64 model). With
    `by_sample` a batch's X comes in one piece for each of its samples: a sequence, a picture. A batch of plain
    vectors, (rows, in), is one sample.
    """

    of_gradient: ClassVar[bool] = False
    by_sample: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        STATISTICS[cls.__name__] = cls

    def refuses(self, site: Site) -> str | None:
        """Why the site cannot have it, or None."""
        if site.kind == "norm":
            return "a normalisation has no weight matrix"
        if site.kind == "experts" and not self.of_gradient:
            return "fused experts choose and multiply their tokens inside one module, which shows no expert's input"
        return None

    def size(self, site: Site) -> int:
        """How many numbers the accumulator holds."""
        raise NotImplementedError

    def accumulator(self, site: Site) -> Accumulator:
        raise NotImplementedError

    def read(self, tensors: dict[str, Tensor]) -> T:
        """The answer from the accumulator's tensors."""
        raise NotImplementedError

    def answers(self, asked: "Statistic[Any]") -> bool:
        """Whether what was collected for this question also answers the other."""
        return self == asked

    def settled(self, accumulators: Sequence[tuple[Any, int]]) -> bool:
        """Whether more batches would change nothing; each accumulator comes with the number of sites that share it."""
        return False


@dataclass(frozen=True)
class InputCovariance(Statistic[Tensor]):
    """`XᵀX / tokens (in, in)`: the inputs' second moments, not centred (GPTQ, EoRA)."""

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return f"its {site.in_} inputs are one-hot, so the matrix is diagonal: ask for InputSecondMoment()"
        return super().refuses(site)

    def size(self, site: Site) -> int:
        return site.in_**2

    def accumulator(self, site: Site) -> Accumulator:
        return CovarianceAccumulator()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


@dataclass(frozen=True)
class InputSecondMoment(Statistic[Tensor]):
    """The mean of x² `(in,)`, feature by feature (Wanda, FLAP). For an embedding: how often each token occurs."""

    def size(self, site: Site) -> int:
        return site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return SecondMomentAccumulator()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


class Magnitude(NamedTuple):
    """Sizes of inputs, feature by feature: both (in,)."""

    mean: Tensor
    largest: Tensor


@dataclass(frozen=True)
class InputMagnitude(Statistic[Magnitude]):
    """The mean and the largest of |x|, feature by feature (AWQ, CBQ)."""

    def refuses(self, site: Site) -> str | None:
        return "its inputs are one-hot" if site.kind == "embedding" else super().refuses(site)

    def size(self, site: Site) -> int:
        return 2 * site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return MagnitudeAccumulator()

    def read(self, tensors: dict[str, Tensor]) -> Magnitude:
        return Magnitude(tensors["mean"], tensors["largest"])


@dataclass(frozen=True)
class SampleCovariance(InputCovariance):
    """`Σ XᵀX / samples (in, in)`, over samples that are each divided by |max X| first (CorDA).

    max X is the sample's largest signed entry; its largest magnitude where that is 0.
    """

    by_sample: ClassVar[bool] = True

    def accumulator(self, site: Site) -> Accumulator:
        return SampleCovarianceAccumulator()


class PCA(NamedTuple):
    """Principal components of inputs, the strongest first; k may be less than asked where there were few tokens."""

    components: Tensor  # (k, in), orthonormal rows, the largest entry of each positive
    ratios: Tensor  # (k,), explained variance over the variance of all features
    singular_values: Tensor  # (k,), of the centred (tokens, in) matrix
    mean: Tensor  # (in,)


@dataclass(frozen=True)
class InputPCA(Statistic[PCA]):
    """The leading principal components of the mean-centred inputs, by incremental SVD (Ross et al. 2008; EVA).

    Components have settled when each one that counts has a cosine of at least `tolerance` with what it was a batch
    before; then the rest of the data is not read for them. Those that count are the `used` part of all sites'
    components that explains most (EVA deals its ranks to these and leaves the others out).
    """

    components: int
    tolerance: float = 0.99
    used: float = 1.0

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.tolerance <= 1 or not 0 < self.used <= 1:
            raise RankfoldError(f"{self}: components must be at least 1, tolerance and used in (0, 1]")

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding":
            return "its inputs are one-hot: they have no directions beyond single tokens"
        return super().refuses(site)

    def size(self, site: Site) -> int:
        return (min(self.components, site.in_) + 2) * site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return IncrementalPCA(min(self.components, site.in_))

    def read(self, tensors: dict[str, Tensor]) -> PCA:
        k = self.components
        return PCA(tensors["components"][:k], tensors["ratios"][:k], tensors["singular_values"][:k], tensors["mean"])

    def answers(self, asked: Statistic[Any]) -> bool:
        """The components asked for are the first of those collected, if these were collected as carefully."""
        return isinstance(asked, InputPCA) and self.components >= asked.components and self.tolerance >= asked.tolerance

    def settled(self, accumulators: Sequence[tuple["IncrementalPCA", int]]) -> bool:
        if any(pca.cosines is None for pca, _ in accumulators):
            return False
        ratios = torch.cat([pca.ratios.cpu().repeat(sites) for pca, sites in accumulators])
        cosines = torch.cat([pca.cosines.cpu().repeat(sites) for pca, sites in accumulators])  # type: ignore[union-attr]
        counting = ratios.argsort(descending=True, stable=True)[: max(1, round(self.used * len(ratios)))]
        return bool((cosines[counting] >= self.tolerance).all())


@dataclass(frozen=True)
class MeanGradient(Statistic[Tensor]):
    """The mean over batches of `∂loss/∂W (out, in)` at this use of W, and (E, out, in) for fused experts.

    The weight is not touched: its gradient comes from the layer's input and output gradient, which also gives a
    quantised layer the gradient of the weight it stands for, and a tied one that of this use alone. Fused experts
    need their own weight's gradient; it is taken and dropped before the next layer's.
    """

    of_gradient: ClassVar[bool] = True

    def size(self, site: Site) -> int:
        return site.count * site.out * site.in_

    def accumulator(self, site: Site) -> Accumulator:
        return MeanGradientAccumulator()

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"]


@dataclass(frozen=True)
class SquaredGradient(MeanGradient):
    """The mean over batches of `(∂loss/∂W)²` (out, in), the gradient being that of a whole batch (SPT).

    It is squared once for each batch, however often the batch uses the layer, so it depends on the batches' size.
    """

    def size(self, site: Site) -> int:
        return 2 * super().size(site)  # the sum, and the gradient of the batch that is under way

    def accumulator(self, site: Site) -> Accumulator:
        return SquaredGradientAccumulator()
