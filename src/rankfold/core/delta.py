"""The Delta contract: one layer's trainable change, said as mathematics and nothing else."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.core.packed import Packed, Scheme, dequantise
from rankfold.core.quantized import base_of, dense
from rankfold.errors import UnsupportedError

if TYPE_CHECKING:
    from rankfold.core.layers import Adapted
    from rankfold.core.rank import Plan


class Site:
    """One place a delta can sit: a weight seen as a matrix `W (out, in)`, whatever the layer that holds it.

    | kind      | layer                              | W                                                       |
    | --------- | ---------------------------------- | ------------------------------------------------------- |
    | linear    | `nn.Linear`, quantised linears     | `weight`                                                |
    | conv1d    | Transformers' `Conv1D` (GPT-2)     | `weight.T`                                              |
    | embedding | `nn.Embedding`                     | `weight.T`: out is the width, in the vocabulary         |
    | conv      | `nn.Conv1d`, `nn.Conv2d`           | `weight` flattened to (out, in / groups · kernel)       |
    | experts   | fused expert weights (a 3-D tensor)| (E, out, in): every shape below gets E in front         |
    | norm      | `nn.LayerNorm` and the like        | none: only its bias can be adapted                      |

    `name` is the layer's path in the model (for experts, with the parameter's name behind it); `batch` is `(E,)` for
    experts and `()` otherwise; `bias` says whether the layer has one.
    """

    def __init__(
        self, name: str, kind: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, parameter: str = "weight"
    ):
        self.name, self.kind, self.bias, self.dtype, self.parameter = name, kind, bias, dtype, parameter
        *batch, self.out, self.in_ = shape
        self.batch = tuple(batch)
        self.layer: Any = None  # the layer itself, set by attach; None where only shapes matter
        self.statistics: Any = None  # what a calibration found, while attach makes an adapter of a method that needs it

    @property
    def count(self) -> int:
        """How many matrices the site holds: E for experts, else 1."""
        return self.batch[0] if self.batch else 1

    def parameter_like(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable parameter of `(*batch, *shape)` on the layer's device, in `self.dtype`."""
        return nn.Parameter(self.empty(*shape))

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of `(*batch, *shape)`, for frozen state."""
        return torch.empty(*self.batch, *shape, dtype=self.dtype, device=self.device)

    @property
    def stored(self) -> Tensor:
        """The layer's weight as it is stored: its own layout, perhaps quantised."""
        return self.layer._parameters[self.parameter]

    @property
    def base(self) -> str:
        """How the layer keeps its weight: as `over` of a `Method` says it; "float" where only shapes matter."""
        return "float" if self.layer is None else base_of(self.stored, self.layer)

    @property
    def device(self) -> torch.device | None:
        return None if self.layer is None else self.stored.device

    def rng(self, seed: int) -> torch.Generator:
        """A CPU generator that depends on the seed and the site's name alone, not on the other sites."""
        digest = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


_PLAIN = {Site, bool, int, float, str}


class Delta(nn.Module):
    """One layer's trainable change. A subclass says its mathematics in **one** of these ways, on `W (out, in)`:

    - `factors() -> (B (out, r), A (r, in))`: the change is `ΔW = scale · B A`;
    - `update() -> ΔW (out, in)`;
    - `transform(W) -> W'`: for a change that depends on the base weight;
    - `scales(s) -> s'`: for a change of the scales (rows, groups) of a packed base, which stays packed when merged;
    - none of them but `forward(x, y) -> y'`: for a change that is no matrix, with y the base layer's output.

    beside which it may say
    - `bias_update(b) -> Δb (out,)`: a change of the layer's bias b (None for a layer without);
    - `forward(x, y)`, and `inputs(x)`: a cheaper way to compute what `transform` defines. The base then gets
      `inputs(x)`, and its output y goes through `forward`. The contract test holds both against each other;
    - `linear(x, W, b)`: a cheaper way to `x W'ᵀ + b` in linear layers than to form the ΔW of `update`, or the W' of
      `transform`;
    - `pack(W) -> codes and scales, scheme`: where `transform` gives a weight of few bits, that weight as it is packed.
      Merging then leaves a packed layer.

    From that the core derives the fused forward, routing by row, merging, export as a plain LoRA and the rest.
    Everything works on a leading expert dimension if the method writes `@`, `.mT` and negative dimensions.

    Parameters are created uninitialised in `__init__` (with `site.parameter_like`), filled by `start(rng)` when an
    adapter is new and from the file when it is loaded. `self.W` is the frozen dense weight the delta sits on, for
    `start` and for methods whose forward needs it.
    """

    scale: float = 1.0
    dropout: float = 0.0  # probability; acts on the input of the `factors` product
    form: ClassVar[str]
    packs: ClassVar[bool]  # ends as a packed weight
    direct: ClassVar[bool]  # computes its output from x and y itself
    biased: ClassVar[bool]  # changes the bias
    fused: ClassVar[bool]  # computes a linear layer's product itself
    stackable: ClassVar[bool]  # a low-rank product and nothing else: rows of a batch can share one batched product
    strength: Callable[[], Tensor | float] | None = None  # how much of the change acts, while a plan asks for less
    B: Any
    A: Any
    B0: Any
    A0: Any
    folded: Any

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) in _PLAIN:  # past the checks of nn.Module: thousands of deltas are made when a server starts
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ways = ("factors", "update", "transform", "scales")
        said = [name for name in ways if getattr(cls, name) is not getattr(Delta, name)]
        if len(said) > 1:
            raise TypeError(f"{cls.__name__} says its change in {len(said)} ways ({', '.join(said)}): say it in one")
        if said:
            cls.form = said[0]
        elif cls.forward is not Delta.forward:
            cls.form = "function"
        else:
            cls.form = "bias"
        cls.direct = cls.forward is not Delta.forward or cls.inputs is not Delta.inputs
        cls.biased = cls.bias_update is not Delta.bias_update
        cls.fused = cls.linear is not Delta.linear
        cls.packs = cls.pack is not Delta.pack
        cls.stackable = cls.form == "factors" and not cls.direct and not cls.biased

    def start(self, rng: torch.Generator) -> None:
        """Fill the parameters so that the layer computes what it did (or document why not)."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def update(self) -> Tensor:
        raise NotImplementedError

    def transform(self, W: Tensor) -> Tensor:
        raise NotImplementedError

    def scales(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def pack(self, W: Tensor) -> tuple[Packed, Scheme]:
        raise NotImplementedError

    def bias_update(self, b: Tensor | None) -> Tensor | None:
        return None

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def linear(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """`x W'ᵀ + b`. An `update` gets None for W and b where the base's product is made apart (16 bits or fewer)."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    # ---- derived, for the core and for methods that need it

    @property
    def mergeable(self) -> bool:
        """Whether the change can be written into the weight and the bias."""
        return self.form != "function"

    @property
    def W(self) -> Tensor:
        """The frozen dense base weight (out, in) under this delta; after `fold`, with the offset taken out."""
        return self.folded if self.is_folded else self.layer.to_matrix(dense(self.site.stored, self.layer))

    def kept_scales(self) -> Tensor:
        """`scales(s)` of the packed layer, rounded to the dtype that it keeps scales in, so that merging is exact.

        Gradients pass through the rounding as if it were not there.
        """
        layer: Any = self.layer
        return as_kept(self.scales(layer.packed.scales.to(self.site.dtype)), layer.scales.dtype)

    @property
    def b(self) -> Tensor | None:
        """The layer's bias (out,), or None."""
        return self.layer.own_bias

    @property
    def layer(self) -> "Adapted":
        return self.site.layer

    @property
    def is_folded(self) -> bool:
        return "folded" in self._buffers

    def pair(self, on_base: bool = False) -> tuple[Tensor, Tensor]:
        """The factors that act on the weight as it stands: `factors()`, and behind them the offset's with a minus sign.

        An offset is a start `scale · B0 A0` that was taken out of the base: the change is `scale · (B A − B0 A0)`, of
        rank up to 2r. After `fold` the weight lacks it already; `on_base=True` asks for the change to the whole base.

        A rank plan has its say here: what it makes of the factors is what everybody gets.
        """
        B, A = self.factors() if self.form == "factors" else self._low_rank()
        if (plan := self.plan) is not None:
            B, A = plan(B, A)
        both = self.less_offset(B, A, on_base)
        return both if self.strength is None or self.form != "factors" else self._weighed(*both, on_base)

    def _weighed(self, B: Tensor, A: Tensor, on_base: bool) -> tuple[Tensor, Tensor]:
        """The factors at their strength g: g (B A - B0 A0), to add to W, or to a folded W that lacks B0 A0."""
        assert self.strength is not None
        g = self.strength()
        if not self.is_folded or on_base:
            return B * g, A
        return torch.cat([B * g, (1 - g) * self.B0.to(B.dtype)], -1), torch.cat([A, self.A0.to(A.dtype)], -2)

    @property
    def plan(self) -> "Plan | None":
        """What a rank plan does to the product (see `rankfold.core.rank`)."""
        return self._modules.get("plan")  # type: ignore[return-value]

    @property
    def by_component(self) -> Mapping[str, int]:
        """The own tensors that have a slice for each component of the product B A, and the dimension it lies along.

        Empty where there is no such product, or where more than these hangs on the rank: then no plan can move it.
        """
        return {}

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The own B (out, r) and A (r, in) with all that was appended to them, without what stands between the two."""
        blocks = () if self.plan is None else self.plan.appended
        if not blocks:
            return self.B, self.A
        return torch.cat([self.B, *(b.B for b in blocks)], -1), torch.cat([self.A, *(b.A for b in blocks)], -2)

    def less_offset(self, B: Tensor, A: Tensor, on_base: bool = False) -> tuple[Tensor, Tensor]:
        """The factors B (out, r), A (r, in) with the offset's behind them, as `pair` has it."""
        if "A0" not in self._buffers or (self.is_folded and not on_base):
            return B, A
        return torch.cat([B, -self.B0.to(B.dtype)], -1), torch.cat([A, self.A0.to(A.dtype)], -2)

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """The B (out, r) and A (r, in) inside a `transform` that contains a product of two factors."""
        return self.B, self.A

    def adapted_weight(self, W: Tensor) -> Tensor:
        """W' (out, in) for the base weight W, in W's dtype: what merging writes."""
        match self.form:
            case "factors":
                B, A = self.pair(on_base=True)
                return W + self.scale * (B.to(W.dtype) @ A.to(W.dtype))
            case "update":
                return W + self.update().to(W.dtype)
            case "transform":
                if self.is_folded:  # then `pair()` leaves the offset out, and so must the weight
                    W = W - self.scale * (self.B0.to(W.dtype) @ self.A0.to(W.dtype))
                return self.transform(W)
            case "scales":
                layer: Any = self.layer
                packed = layer.packed._replace(scales=self.kept_scales())
                return dequantise(packed, (self.site.out, self.site.in_), layer.scheme, W.dtype)
            case "bias":
                return W
        raise UnsupportedError(
            f"{type(self).__name__} at {self.site.name} changes the output by a function, not by a ΔW: "
            "it cannot be merged or exported as one"
        )

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Let own tensors have the sizes that a file gives them, where hyperparameters do not fix those.

        `shapes` are by the names of tensors in this delta, and not checked: what does not fit is left for the check
        of all shapes, which follows. Here it is the rank of an offset that the file decides.
        """
        if self.startable and {"B0", "A0"} <= shapes.keys():
            k = shapes["A0"][-2:-1]
            self.register_buffer("B0", self.B.new_empty(*self.B.shape[:-1], *k))
            self.register_buffer("A0", self.A.new_empty(*self.A.shape[:-2], *k, self.A.shape[-1]))
        if planned := {name[5:]: shape for name, shape in shapes.items() if name.startswith("plan.")}:
            from rankfold.core.rank import make_room  # it needs adapters, which need deltas

            make_room(self, planned)

    def wrong(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What makes tensors from a file, of the right shapes and finite, unfit for this delta; None if nothing."""
        return None

    @property
    def diagonal(self) -> nn.Parameter | None:
        """The trained diagonal (r,) between B and A, a number for each rank-one part; None where there is none."""
        return None

    @property
    def startable(self) -> bool:
        """Whether an init can set its start: it has factors of its own called B and A."""
        own = self._parameters.keys() | self._buffers.keys()
        return "A" in own and "B" in own

    @torch.no_grad()
    def set_start(self, B: Tensor, A: Tensor, M: Tensor | None = None, *, offset: bool = False) -> None:
        """Start the product at `B (out, r)`, `M (r, r)`, `A (r, in)`; with `offset`, take it out again behind that.

        Without M the core, where there is one, starts at I. A delta without a core takes M into its B.
        """
        rest = self.set_middle(torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) if M is None else M)
        self.B.copy_(B if M is None else B @ rest)
        self.A.copy_(A)
        if offset:
            self.set_offset(B if M is None else B @ M, self.A)

    def set_middle(self, M: Tensor) -> Tensor:
        """Take what the core between B and A can hold of M (r, r); the rest is given back. Here there is no core."""
        return M

    def set_offset(self, B0: Tensor, A0: Tensor) -> None:
        """Take `scale · B0 A0` out of the weight, behind what is taken out already: B0 (out, k), A0 (k, in)."""
        B0, A0 = (t.detach().to(self.A.dtype) for t in (B0, A0))
        if "A0" in self._buffers:
            B0, A0 = torch.cat([self.B0, B0], -1), torch.cat([self.A0, A0], -2)
        self.register_buffer("B0", B0.clone())
        self.register_buffer("A0", A0.clone())


def as_kept(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a dtype, in their own; gradients pass as if they were not."""
    return values.detach().to(dtype).to(values.dtype) + (values - values.detach())


@torch.no_grad()
def fill(tensor: Tensor, rng: torch.Generator, *, bound: float | None = None, std: float | None = None) -> Tensor:
    """Fill in place from the CPU generator: uniform on ±bound, or normal with the standard deviation."""
    here = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    drawn = tensor if here else torch.empty(tensor.shape, dtype=torch.float32)
    if bound is not None:
        drawn.uniform_(-bound, bound, generator=rng)
    else:
        drawn.normal_(0.0, std or 0.0, generator=rng)
    return tensor if here else tensor.copy_(drawn)
