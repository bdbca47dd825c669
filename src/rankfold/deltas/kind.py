"""KIND: Knowledge Integration and Diversion in Diffusion Models. Xie et al. 2024, arXiv 2408.07337."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from rankfold.core import Iterations, LowRank, Site, fill
from rankfold.core.adapter import Adapter
from rankfold.core.factored import Extracted
from rankfold.core.linalg import leading_svd
from rankfold.core.routing import state_of
from rankfold.errors import RankfoldError, UnsupportedError


class KIND(LowRank):
    """`W(c) = U_G diag(σ_G) V_Gᵀ + Σ_t g_t(c) U_t diag(σ_t) V_tᵀ`: parts for every class, and parts for some.

    Of K = `rank` rank-one parts the first are the `learngenes`; the others are tailors, in equal `groups` t. A row
    of class c runs with the learngenes and group c; without a class every gate is open. `classes` says what the rows
    of a batch are. U (out, K), σ (K,) and V (in, K) are all trained, B, sigma and Aᵀ here; nothing keeps them
    orthogonal.

    The paper trains models from nothing. This is its form for a pretrained W: the K leading singular triples of W are
    the start, taken out of the base as an offset, so that with open gates the layer starts as it was. With K the
    shorter side of W that is all of W; a smaller K leaves the rest in the base, for every class. The leading parts
    become learngenes. s = α / K is 1 unless α is given.

    Stage 2 puts new tailors on frozen learngenes: attach `KIND(learngenes=0, start="zero")`, with U = 0, σ = 1, V
    uniform on ±1/√in, and hand the trained adapter to `inherit`. The paper's sizes of groups are not known to us.
    """

    slug: ClassVar[str] = "kind"
    title: ClassVar[str] = "KIND: Knowledge Integration and Diversion in Diffusion Models"
    source: ClassVar[str] = "arXiv 2408.07337"

    learngenes: Annotated[int, Field(ge=0, description="rank-one parts that serve every class")] = 4
    groups: Annotated[int, Field(ge=1, description="tailor groups, one a class")] = 4
    start: Literal["svd", "zero"] = "svd"
    iterations: Iterations = None

    @model_validator(mode="after")
    def _divides(self) -> Self:
        tailors = self.rank - self.learngenes
        if tailors < self.groups or tailors % self.groups:
            raise ValueError(f"rank - learngenes must be a multiple of {self.groups} groups, not {tailors}")
        return self

    def delta(self, site: Site, shared: nn.Module | None) -> "KINDDelta":
        return KINDDelta(site, self)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_ + site.out + 1)


class KINDDelta(Extracted):
    """B = U (out, K), sigma (K,), A = Vᵀ (K, in), all trained; gates (groups + 1, K), the last row all ones."""

    middle: ClassVar[str] = "sigma"
    trained: ClassVar[frozenset[str]] = frozenset({"B", "sigma", "A"})
    sigma: Tensor
    gates: Tensor

    def __init__(self, site: Site, method: KIND):
        super().__init__(site, method.rank, method.scale, method.dropout)
        self.from_svd, self.iterations, self.learngenes = method.start == "svd", method.iterations, method.learngenes
        tailors = torch.eye(method.groups).repeat_interleave((method.rank - method.learngenes) // method.groups, 1)
        gates = F.pad(F.pad(tailors, (method.learngenes, 0), value=1), (0, 0, 0, 1), value=1)
        self.register_buffer("gates", gates.to(site.device, site.dtype), persistent=False)

    @property
    def by_component(self) -> Mapping[str, int]:
        return {}  # what a component is for hangs on its place

    def start(self, rng: torch.Generator) -> None:
        if self.from_svd:
            U, sigma, Vt = leading_svd(self.W, self.sigma.shape[-1], rng, self.iterations)
            self.set_start(U, Vt, torch.diag_embed(sigma / self.scale), offset=True)
        else:
            fill(self.A, rng, bound=self.site.in_**-0.5)
            nn.init.ones_(self.sigma)
            nn.init.zeros_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of the class that all rows have; with one class a row there is no one ΔW."""
        tags = None if self.site.layer is None else self.layer._rankfold.tags  # of a file alone there are no rows
        B, A = super().factors()
        if isinstance(tags, Tensor):
            raise UnsupportedError(f"the rows have classes of their own, and {self.site.name} needs one W for all")
        return B if tags is None else B * self.gates[tags], A

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():  # and not the ids of an embedding
            x = F.dropout(x, self.dropout, self.training)
        tags = self.layer.tags(x)
        if not isinstance(tags, Tensor):
            B, A = self.pair()
            return y + self.layer.product(x, A, B, self.scale)
        B, A = self.less_offset(*super().factors())
        gain = F.pad(self.gates[tags], (0, A.shape[-2] - self.gates.shape[-1]), value=1)  # the offset is for every row
        return y + self.layer.product(x, A, B, self.scale, gain)


@contextmanager
def classes(model: nn.Module, choice: int | Sequence[int | None] | None) -> Iterator[None]:
    """Run the model, inside a `with` block, with all rows of one class, or with a class for each row of the batch.

    A class is the number of its tailor group; None opens all gates. Other threads' forwards wait until the block ends,
    as with `rankfold.using`, and with gradient checkpointing `backward` belongs inside too. `rankfold.as_lora` inside a
    block of one class gives that class's ΔW for good; `rankfold.merge` does as long as nothing else is merged after it.
    """
    state = state_of(model)
    deltas = [delta for adapter in state.adapters.values() for delta in adapter.deltas.values()]
    groups = min((len(delta.gates) - 1 for delta in deltas if isinstance(delta, KINDDelta)), default=0)
    chosen = [choice] if choice is None or isinstance(choice, int) else list(choice)
    if wrong := [one for one in chosen if one is not None and not 0 <= one < groups]:
        raise RankfoldError(f"there is no class {wrong[0]}: the model's adapters have {groups} tailor groups, from 0")
    tags: Any = choice
    if not isinstance(choice, int | None):
        tags = torch.tensor([-1 if one is None else one for one in choice])
    with state.lock, state.tagged(tags):
        yield


@torch.no_grad()
def inherit(adapter: Adapter, trained: Adapter) -> None:
    """Stage 2: let new tailors stand on the learngenes of a trained adapter of the same layers, which stay frozen.

    Every ΔW becomes `ΔW_new + U_G diag(σ_G) V_Gᵀ − offset` of the trained one, all in the new adapter's own offset.
    """
    if adapter.deltas.keys() != trained.deltas.keys():
        raise RankfoldError(f"adapters {adapter.name!r} and {trained.name!r} sit on different layers")
    for name, delta in adapter.deltas.items():
        source = trained.deltas[name]
        if not isinstance(source, KINDDelta) or delta.is_folded:
            raise RankfoldError(
                f"inherit takes the learngenes of a kind, and an adapter that is not folded (at {name})"
            )
        G, ratio = source.learngenes, source.scale / delta.scale
        B, A = source.less_offset((source.B * source.sigma[..., None, :])[..., :G], source.A[..., :G, :], on_base=True)
        delta.set_offset(-ratio * B, A)
