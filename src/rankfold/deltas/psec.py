"""PSEC: Skill Expansion and Composition in Parameter Space. Liu et al. 2025, arXiv 2502.05932."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site, fill
from rankfold.core.routing import state_of
from rankfold.errors import RankfoldError

_MOST = 256  # skills in one adapter


class PSEC(Method):
    """`y = W0 x + b + Σ_i α_i(s) B_i A_i x` over n frozen skills: LoRAs that were trained before, each on its own.

    The same α for every layer. "learned": n trained numbers. "context": `α(s) = MLP(s)`, ReLU, without softmax, of
    what `context` says of each row: s (rows, `width`); α then starts at `start` for every s, since the last layer's
    weights start at 0, and there is no one ΔW. "constant": `start` for good, which is task arithmetic.

    A skill's own scale is in its B here, so α = 0 is the base and α = e_i skill i. The paper's α is 16 times that: its
    skills have B A without a scale, and 16 as the weight of one alone. `rankfold.compose.psec` puts trained skills in;
    an adapter attached without holds random ones, A and B lecun-normal. `ranks` are those of the skills at a layer,
    0 for one that does not sit there.

    The authors train the last skill along with α; here a skill is trained as any adapter is, and α after it.
    """

    slug: ClassVar[str] = "psec"
    title: ClassVar[str] = "Skill Expansion and Composition in Parameter Space"
    source: ClassVar[str] = "arXiv 2502.05932"

    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=_MOST)] = (8, 8)
    weights: Annotated[Literal["constant", "learned", "context"], Field(description="what α comes from")] = "learned"
    start: Annotated[tuple[float, ...], Field(description="α at the start; empty: 0")] = ()
    width: Annotated[int, Field(ge=0, description="numbers in a context s")] = 0
    hidden: Annotated[tuple[int, int], Field(description="hidden layers of the MLP")] = (256, 256)
    skills: Annotated[tuple[str, ...], Field(description="names of the skills")] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if len(self.start) not in (0, len(self.ranks)) or len(self.skills) not in (0, len(self.ranks)):
            raise ValueError(f"there are {len(self.ranks)} skills: start and skills must have as many, or none")
        if (self.weights == "context") != (self.width > 0) or min(self.hidden) < 1:
            raise ValueError("width is how many numbers a context has: above 0 with weights=context, else 0")
        return self

    def shared(self, sites: Sequence[Site], seed: int) -> "Weights":
        rng = sites[0].rng(seed) if sites else torch.Generator()
        return Weights(self, sites[0].dtype if sites else torch.float32, rng)

    def shared_count(self, sites: Sequence[Site]) -> int:
        n, (first, second) = len(self.ranks), self.hidden
        mlp = (self.width + 1) * first + (first + 1) * second + (second + 1) * n
        return {"constant": 0, "learned": n, "context": mlp}[self.weights]

    def delta(self, site: Site, shared: Any) -> "PSECDelta | ContextDelta":
        return (ContextDelta if self.weights == "context" else PSECDelta)(site, self, shared)

    def count(self, site: Site) -> int:
        return 0

    def refuses(self, site: Site) -> str | None:
        largest = min(site.in_, site.out)
        return f"rank {max(self.ranks)} is over the layer's size, {largest}" if max(self.ranks) > largest else None


class Weights(nn.Module):
    """α (n,), a parameter or fixed; or the layers of the MLP, whose `forward` takes s (rows, width) to α (rows, n)."""

    alpha: Tensor
    layers: Any

    def __init__(self, method: PSEC, dtype: torch.dtype, rng: torch.Generator):
        super().__init__()
        n = len(method.ranks)
        start = torch.tensor(method.start or (0.0,) * n, dtype=dtype)
        if method.weights == "learned":
            self.alpha = nn.Parameter(start)
        elif method.weights == "constant":
            self.register_buffer("alpha", start)
        else:
            sizes = (method.width, *method.hidden, n)
            self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, *pair, dtype=dtype) for pair in pairwise(sizes))
            for layer in self.layers:
                fill(layer.weight.data, rng, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.layers[-1].weight)
            self.layers[-1].bias.data.copy_(start)

    def forward(self, s: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(second(first(s.to(first.weight.dtype)).relu()).relu())


class _Bank(Delta):
    """The skills one after the other: Bs (out, R) and As (R, in), R the sum of their ranks, both frozen."""

    Bs: Tensor
    As: Tensor
    of: Tensor

    def __init__(self, site: Site, method: PSEC, shared: Weights):
        super().__init__(site)
        self.shared, R = shared, sum(method.ranks)
        self.register_buffer("Bs", site.empty(site.out, R))
        self.register_buffer("As", site.empty(R, site.in_))
        index = torch.arange(len(method.ranks)).repeat_interleave(torch.tensor(method.ranks))
        self.register_buffer("of", index.to(site.device), persistent=False)  # the skill that a component is of

    def start(self, rng: torch.Generator) -> None:
        fill(self.As, rng, std=self.site.in_**-0.5)
        fill(self.Bs, rng, std=max(1, self.Bs.shape[-1]) ** -0.5)


class PSECDelta(_Bank):
    """One α for all rows."""

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.Bs * self.shared.alpha[self.of].to(self.Bs.dtype), self.As


class ContextDelta(_Bank):
    """An α for each row, from its context."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.layer.tags(x)
        if not isinstance(s, Tensor) or not s.is_floating_point():
            raise RankfoldError(
                f"the weights of the skills at {self.site.name} hang on a context: run the model inside `with "
                "rankfold.deltas.psec.context(model, s)`"
            )
        gain = self.shared(s)[:, self.of]
        return y + self.layer.product(x, self.As, self.Bs, 1.0, gain)


@contextmanager
def context(model: nn.Module, s: Tensor) -> Iterator[None]:
    """Run the model, inside a `with` block, in the contexts s (rows, width), one for each row of the batch.

    Other threads' forwards wait until the block ends, and with gradient checkpointing `backward` belongs inside.
    """
    state = state_of(model)
    widths = {a.method.width for a in state.adapters.values() if isinstance(a.method, PSEC)} - {0}
    if s.dim() != 2 or not s.is_floating_point() or s.shape[1] not in widths:
        raise RankfoldError(
            f"a context is a number for each of (rows, width), width being {sorted(widths)} here, not {s.dtype} "
            f"{tuple(s.shape)}"
        )
    with state.lock, state.tagged(s):
        yield
