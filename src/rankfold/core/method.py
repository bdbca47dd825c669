"""Contracts beside Delta: Method (how ΔW is parameterised), Init (its start), Callback (around a step), Optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core.component import Component
from rankfold.core.delta import Delta, Site

if TYPE_CHECKING:
    from rankfold.core.calibration import Calibration, Statistic

Rank = Annotated[int, Field(ge=1, description="rank r of the product B A")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="probability of dropping an input of the low-rank product")]
Iterations = Annotated[int | None, Field(ge=0, description="power iterations of a randomised SVD; None: exact")]


BASES = ("float", "packed", "foreign")
OTHER_BASES: dict[tuple[str, ...], str] = {
    ("packed",): "it changes the scales of a packed linear layer, and this is none: make a packed base first, with "
    "`rankfold quantize` or rankfold.quantize(model, Scheme(...))",
    ("float",): "it rounds the float weight itself, and this one is quantised: load the base in float",
}


class Start(NamedTuple):
    """Where a product starts: `B (out, r)`, `A (r, in)`, and `M (r, r)` between them (None is I).

    With `offset` the change starts at zero: the core takes `scale · B M A` out again.
    """

    B: Tensor
    A: Tensor
    M: Tensor | None = None
    offset: bool = False


class Method(Component):
    """Hyperparameters plus the recipe that builds a delta for one layer. A new method needs three things:

    - `delta(site, shared)`: the Delta of one site, parameters uninitialised;
    - `count(site)`: how many numbers it trains there (the paper's formula, for one matrix of an expert site);
    - `refuses(site)`: why a site cannot be adapted, where the mathematics rules it out (default: it can).

    State shared by all layers of an adapter (a random basis, a pool) comes from `shared(sites, seed)`; every delta is
    handed the same module. Its parameters are trained and stored once; buffers it can make again from the seed are
    registered with `persistent=False`. `shared_count(sites)` is how many of its numbers are trained.
    """

    axis: ClassVar[str] = "deltas"
    bias_only: ClassVar[bool] = False  # changes nothing but biases, so it can sit on layers without a weight matrix
    # What it can sit on: float weights, packed ones (`rankfold.quantize`), those of other libraries in few bits.
    over: ClassVar[tuple[str, ...]] = BASES
    departs: ClassVar[str | None] = None  # why a fresh delta does not compute what the layer did, if so
    # The hyperparameter that says how many numbers it trains; a method without such a field has one size only.
    size: ClassVar[str] = "rank"

    def delta(self, site: Site, shared: nn.Module | None) -> Delta:
        raise NotImplementedError

    def count(self, site: Site) -> int:
        raise NotImplementedError

    def shared(self, sites: Sequence[Site], seed: int) -> nn.Module | None:
        return None

    def shared_count(self, sites: Sequence[Site]) -> int:
        return 0

    def needs(self) -> "tuple[Statistic, ...]":
        """The calibration statistics that `spread` or `Delta.start` read, from `site.statistics`."""
        return ()

    def spread(self, sites: Sequence[Site], seed: int) -> dict[str, dict[str, Any] | None]:
        """Hyperparameters that a new adapter gives single sites, by name, out of all of them; None leaves a site out.

        For a budget that is shared out, or a choice that looks at the weights or at statistics of the data: what it
        comes to is saved, site by site, so that a loaded adapter has what the trained one had.
        """
        return {}

    def refuses(self, site: Site) -> str | None:
        return None

    def refusal(self, site: Site) -> str | None:
        """Why this method cannot sit on the site, for its own reasons or the layer's; None if it can."""
        if site.kind == "norm" and not self.bias_only:
            return "a normalisation has no weight matrix"
        if site.base not in self.over:
            return OTHER_BASES[self.over]
        return self.refuses(site)

    def num_parameters(self, sites: Sequence[Site], seed: int = 0) -> int:
        """Trainable numbers of a new adapter on these sites, by the card's formula.

        Where `spread` looks at the weights the sites must be a model's, and have the statistics that it `needs`.
        """
        spread = self.spread(sites, seed)
        kept = [site for site in sites if spread.get(site.name, {}) is not None]
        methods = [self.model_copy(update=spread.get(site.name)) for site in kept]
        own = sum(site.count * method.count(site) for site, method in zip(kept, methods, strict=True))
        return own + self.shared_count(kept)


class Init(Component):
    """Where the factors of a low-rank product start: works on every delta with factors B and A of its own.

    `needs(rank)` states the calibration statistics it reads (see `rankfold.core.calibration`); without any it is
    computed from the weight alone.
    """

    axis: ClassVar[str] = "inits"

    def needs(self, rank: int) -> "tuple[Statistic, ...]":
        return ()

    def ranks(self, sites: Sequence[Site], rank: int, statistics: "Calibration | None") -> dict[str, int]:
        """Sites, by name, that get another rank than the method's; 0 leaves a site out."""
        return {}

    def factors(
        self, site: Site, W: Tensor, rank: int, scale: float, statistics: "Calibration | None", rng: torch.Generator
    ) -> Start:
        """The start of a product of that rank on the site, whose float32 weight is W (out, in)."""
        raise NotImplementedError


class Callback(Component):
    """What a technique does around an optimiser step. In a bare loop:

        for step, batch in enumerate(loader):
            loss = model(**batch).loss
            for callback in callbacks:
                if (penalty := callback.penalty()) is not None:
                    loss = loss + penalty
            loss.backward()
            for callback in callbacks: callback.before_step(step)
            optimizer.step()
            for callback in callbacks: callback.after_step(step)
            optimizer.zero_grad()
        for callback in callbacks: callback.on_end()

    `on_attach(adapter, model)` comes first, once; `on_start(optimizer, steps)` when the optimiser is there, with the
    number of steps that are planned (None where time or tokens end the training); `on_end()` last, before the adapter
    is saved. A callback that says it `reads` batches gets them between the first two: `on_data(batch_at)`. The Trainer
    bridge makes the same calls; after a resume `on_load` comes before `on_start`.
    """

    axis: ClassVar[str] = "callbacks"
    # "training": batches of the rows that are trained on; "validation": of rows kept out of the training for it.
    reads: ClassVar[Literal["training", "validation"] | None] = None
    without_adapter: ClassVar[bool] = False  # also works where a model is trained itself: `on_attach(None, model)`

    def on_attach(self, adapter: Any, model: nn.Module) -> None: ...

    def on_data(self, batch_at: Callable[[int], Mapping[str, Any]]) -> None:
        """Take a stream of batches: `batch_at(i)` is the i-th, always the same, as `model(**batch)` takes it."""

    def on_start(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None: ...

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None: ...

    def on_end(self) -> None: ...

    def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> Iterable[dict[str, Any]] | None:
        """Optimiser parameter groups over the adapter's parameters, or None to leave them to others."""
        return None

    def on_save(self) -> dict[str, Any]:
        """State to keep with a checkpoint: tensors and plain JSON values."""
        return {}

    def on_load(self, state: Mapping[str, Any]) -> None:
        """Take back what `on_save` gave."""


class Optimizer(Component):
    """How trained parameters are stepped: `optimizer(groups, lr, weight_decay)` gives a `torch.optim.Optimizer`.

    `groups` are parameter groups as torch.optim takes them; what a group says itself (its own `lr`) goes before the
    arguments. What a technique only does around a step, whoever steps, is a `Callback`.
    """

    axis: ClassVar[str] = "optim"
    backward: ClassVar[bool] = True  # False: there are no gradients, `step(closure)` evaluates the loss itself
    # Which sharding of parameters it works with: DTensor as FSDP2 has them, or any, as of FSDP1 and DeepSpeed.
    shards: ClassVar[Literal["none", "DTensor", "any"]] = "none"

    def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> Iterable[dict[str, Any]] | None:
        """The groups that it needs over the adapter's parameters, or None where any will do."""
        return None

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        raise NotImplementedError
