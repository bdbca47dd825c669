"""Adapted layers: what each kind of layer must know so that every delta works on it.

An adapted layer is the user's own layer whose class was exchanged for a subclass made here (`AdaptedLinear` of
`nn.Linear`, ...): it keeps its parameters, their names, its hooks and its `isinstance`, and `detach` gives the old
class back. Its deltas sit in `layer.deltas`, by adapter name.
"""

import copy
import functools
import sys
import types
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.core.delta import Delta, Site
from rankfold.core.lowrank import add_lowrank, add_lowrank_rows, lowrank_linear
from rankfold.core.packed import PackedLinear
from rankfold.core.quantized import is_plain, prepare
from rankfold.core.routing import Rows, State
from rankfold.errors import RankfoldError, UnsupportedError


def _never_called(*_: Any) -> None: ...


class Deltas(nn.Module):
    """The deltas of one weight, by adapter name (any name, so not an `nn.ModuleDict`)."""

    def __init__(self, state: State):
        super().__init__()
        self._state = state
        # `nn.TransformerEncoderLayer` reads its linears' weights past their forward, unless a module in it has a hook.
        self.register_forward_pre_hook(_never_called)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, without merged adapters: they are in the base weight already."""
        merged = self._state.merged
        kept = self._modules
        self._modules = {name: delta for name, delta in kept.items() if name not in merged}
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self._modules = kept


class Adapted:
    """Mixin that comes before the layer's own class. Each subclass says how a kind of layer uses a W (out, in)."""

    kind: ClassVar[str]
    deltas: Deltas
    _rankfold: State
    _plain: ClassVar[type[nn.Module]]
    _made_from: ClassVar[tuple[Any, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled through what its class was made from, since the class itself has no importable name."""
        return _rebuild, self._made_from, self.__dict__

    # ---- what a kind says

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        """The places in the layer where a delta can sit, with shapes only."""
        return []

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as W (out, in); a view where the layout allows."""
        return weight

    def from_matrix(self, W: Tensor) -> Tensor:
        """W (out, in) in the layout the layer stores."""
        return W

    def functional(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """What the layer computes with the weight W (out, in) and the bias b in place of its own."""
        raise NotImplementedError

    def product(self, x: Tensor, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
        """What the layer computes with the weight `scale · B A` and no bias, through the factors.

        With `gain (rows, r)` each row of x has a `scale · B diag(gain) A` of its own.
        """
        raise NotImplementedError

    def outwise(self, v: Tensor) -> Tensor:
        """v (out,) shaped to multiply or add along the output's channels."""
        return v

    @property
    def channel(self) -> int:
        """The dimension of the output's channels, counted from behind."""
        return -1

    def tags(self, x: Tensor) -> Tensor | int | None:
        """What the rows of x carry: an integer for all, or something for each row, or None (see `State.tagged`)."""
        return self._rankfold.tags_of(x)

    # ---- the base

    @property
    def own_bias(self) -> Tensor | None:
        return self._parameters.get("bias")  # type: ignore[attr-defined]

    def base(self, x: Tensor, delta: Delta | None = None) -> Tensor:
        """The layer's own output, or with the delta's folded weight where it has one."""
        if delta is None or not delta.is_folded:
            return super().forward(x)  # type: ignore[misc]
        return self.functional(x, delta.folded, self.own_bias)

    # ---- one adapter, or one for each row

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        route = self._rankfold.route
        if route is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if isinstance(route, Rows):
            return self.by_row(x, route)
        delta = self.deltas._modules.get(route)
        return super().forward(x, *args, **kwargs) if delta is None else self.under(x, delta)  # type: ignore[misc,arg-type]

    def under(self, x: Tensor, delta: Delta) -> Tensor:
        """The output under one delta, or under as much of it as its `strength` says."""
        y = self.adapted(x, delta)
        if delta.strength is None or delta.form == "factors":  # whose product has the strength in it already
            return y
        y0 = self.base(x)
        return y0 + delta.strength() * (y - y0)

    def adapted(self, x: Tensor, delta: Delta) -> Tensor:
        """The output under the whole of one delta."""
        change = delta.bias_update(self.own_bias) if delta.biased and not delta.direct else None
        if delta.form == "scales":
            return self.multiply(x, delta.kept_scales())  # type: ignore[attr-defined]
        if delta.direct:
            y = self.base(delta.inputs(x).to(x.dtype) if x.is_floating_point() else x, delta)
            return delta(x, y).to(y.dtype)
        if delta.form == "factors":
            y = self.with_factors(x, delta)
        elif delta.form == "transform" or (delta.form == "update" and self.exact_sum(delta)):
            W = delta.W.to(delta.site.dtype)
            y = self.functional(
                x, delta.transform(W) if delta.form == "transform" else W + delta.update(), self.own_bias
            )
        else:
            y = self.base(x, delta)
            if delta.form == "update":
                y = y + self.functional(x, delta.update(), None).to(y.dtype)
        return y if change is None else y + self.outwise(change).to(y.dtype)

    def exact_sum(self, delta: Delta) -> bool:
        """Whether W + ΔW may be formed before the product: not where a 16-bit or quantised W would round ΔW away."""
        weight = self._parameters[delta.site.parameter]  # type: ignore[attr-defined]
        return is_plain(weight) and weight.dtype == delta.site.dtype

    def with_factors(self, x: Tensor, delta: Delta) -> Tensor:
        B, A = delta.pair()
        y = self.base(x, delta)
        return y + self.product(F.dropout(x, delta.dropout, delta.training), A, B, delta.scale).to(y.dtype)

    def by_row(self, x: Tensor, rows: Rows) -> Tensor:
        """Each row under its own delta: rows of one adapter go through the layer together."""
        deltas = list(map(self.deltas._modules.get, rows.distinct))  # type: ignore[arg-type]
        if not any(d is not None for d in deltas):
            return super().forward(x)  # type: ignore[misc]
        stack = rows.kept(self, deltas)
        if stack is not None or all(d is None or self.stackable(d) for d in deltas):  # type: ignore[arg-type]
            return self.stacked(x, rows, deltas, stack)

        def one(delta: Delta | None, x: Tensor, tags: Tensor | int | None) -> Tensor:
            if delta is None:
                return super(Adapted, self).forward(x)  # type: ignore[misc]
            if tags is None:
                return self.under(x, delta)
            with self._rankfold.tagged(tags):  # those of these rows
                return self.under(x, delta)

        return rows.apart(one, deltas, type(self).__name__, x, self.tags(x))

    def stackable(self, delta: Delta) -> bool:
        """Whether rows of this delta can share one batched product with rows of others."""
        return False

    def stacked(self, x: Tensor, rows: Rows, deltas: list[Any], stack: tuple[Tensor, Tensor] | None) -> Tensor:
        raise NotImplementedError


class AdaptedLinear(Adapted):
    kind = "linear"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        shape = (layer.out_features, layer.in_features)
        dtype = layer.dtype if isinstance(layer, PackedLinear) else layer.weight.dtype
        return [Site(name, "linear", shape, layer.bias is not None, _delta_dtype(dtype))]

    def base(self, x: Tensor, delta: Delta | None = None) -> Tensor:
        y = super().base(x, delta)
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            weight = self._parameters["weight"]  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"a {self._plain.__name__} with a weight of type {type(weight).__name__} passes no gradient to its "
                "input, so the layers before it cannot train: quantise weights only, or run without gradients"
            )
        return y

    def adapted(self, x: Tensor, delta: Delta) -> Tensor:
        if not delta.fused or x.is_nested or hasattr(self, "product_with"):
            return super().adapted(x, delta)
        if delta.form != "update" or self.exact_sum(delta):
            return delta.linear(x, delta.W, self.own_bias)
        y = self.base(x, delta)
        return y + delta.linear(x, None, None).to(y.dtype)

    def functional(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        linear = getattr(self, "product_with", F.linear)  # a layer may have a way of its own
        return linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def product(self, x: Tensor, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
        h = F.linear(x, A.to(x.dtype)) * scale
        return F.linear(h if gain is None else h * _per_row(gain, h), B.to(x.dtype))

    def with_factors(self, x: Tensor, delta: Delta) -> Tensor:
        if x.is_nested:  # as `nn.TransformerEncoder` makes them of padded batches
            return super().with_factors(x, delta)
        B, A = delta.pair()
        weight = delta.folded if delta.is_folded else self._parameters["weight"]  # type: ignore[attr-defined]
        if self.fusable(weight) and not (delta.dropout and delta.training):
            return lowrank_linear(x, weight, self.own_bias, A, B, delta.scale)
        return add_lowrank(self.base(x, delta), F.dropout(x, delta.dropout, delta.training), A, B, delta.scale)

    def fusable(self, weight: Tensor) -> bool:
        return is_plain(weight) and self._plain is nn.Linear

    def stackable(self, delta: Delta) -> bool:
        return delta.stackable and not delta.is_folded and not (delta.dropout and delta.training)

    def stacked(self, x: Tensor, rows: Rows, deltas: list[Any], stack: tuple[Tensor, Tensor] | None) -> Tensor:
        """`stack` is A (R, r, in) and B (R, out, r) where an earlier forward left them."""
        repeat = rows.repeat(x, type(self).__name__)
        A, B = rows.keep(self, deltas, *_stack(deltas, rows)) if stack is None else stack
        y = self.base(x)
        if repeat == 1:
            return add_lowrank_rows(y, x, A, B)
        # A row of the batch is several consecutive rows here: seen as one longer row.
        split = len(rows.names), repeat
        return add_lowrank_rows(y.unflatten(0, split), x.unflatten(0, split), A, B).flatten(0, 1)


class AdaptedConv1D(AdaptedLinear):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored as (in, out)."""

    kind = "conv1d"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        return [Site(name, "conv1d", tuple(reversed(layer.weight.shape)), True, _delta_dtype(layer.weight.dtype))]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.T.contiguous()

    def fusable(self, weight: Tensor) -> bool:
        return False


class AdaptedEmbedding(Adapted):
    kind = "embedding"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        return [
            Site(
                name, "embedding", (layer.embedding_dim, layer.num_embeddings), False, _delta_dtype(layer.weight.dtype)
            )
        ]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.T.contiguous()

    def functional(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self._scaled(self._rows_of(x, W))

    def product(self, x: Tensor, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
        h = self._rows_of(x, A) * scale
        return self._scaled(F.linear(h if gain is None else h * _per_row(gain, h), B))

    def with_factors(self, x: Tensor, delta: Delta) -> Tensor:
        B, A = delta.pair()  # ids cannot be dropped out
        y = self.base(x, delta)
        return y + self.product(x, A, B, delta.scale).to(y.dtype)

    def _rows_of(self, ids: Tensor, W: Tensor) -> Tensor:
        return F.embedding(ids, W.mT, self.padding_idx)  # type: ignore[attr-defined]

    def _scaled(self, y: Tensor) -> Tensor:
        """Gemma's embedding multiplies its output by a constant."""
        scale = getattr(self, "embed_scale", None)
        return y if scale is None else y * torch.as_tensor(scale, device=y.device).to(y.dtype)


class AdaptedConv(Adapted):
    kind = "conv"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        shape = (layer.out_channels, layer.weight[0].numel())
        return [Site(name, "conv", shape, layer.bias is not None, _delta_dtype(layer.weight.dtype))]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.reshape(self._parameters["weight"].shape)  # type: ignore[attr-defined]

    def functional(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self._conv_forward(x, self.from_matrix(W).to(x.dtype), None if b is None else b.to(x.dtype))  # type: ignore[attr-defined]

    def product(self, x: Tensor, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None) -> Tensor:
        """A is a convolution to r channels (the same for each group of input channels), B one of kernel 1."""
        groups, kernel = self.groups, self._parameters["weight"].shape[1:]  # type: ignore[attr-defined]
        down = A.reshape(-1, *kernel).repeat(groups, *[1] * len(kernel))
        up = (B * scale).reshape(*B.shape, *[1] * (len(kernel) - 1))
        h = self._conv_forward(x, down.to(x.dtype), None)  # type: ignore[attr-defined]
        if gain is not None:
            h = h * gain.repeat(1, groups).to(h.dtype).reshape(*gain.shape[:1], -1, *[1] * (len(kernel) - 1))
        conv = F.conv2d if len(kernel) == 3 else F.conv1d
        return conv(h, up.to(x.dtype), groups=groups)

    def outwise(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (-1 - self.channel))

    @property
    def channel(self) -> int:
        return 1 - self._parameters["weight"].dim()  # type: ignore[attr-defined]


class AdaptedNorm(Adapted):
    """`nn.LayerNorm`: its bias is added last; it has no matrix, so only its bias can be adapted."""

    kind = "norm"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        if layer.bias is None:
            return []
        return [Site(name, "norm", (layer.bias.numel(), 0), True, _delta_dtype(layer.bias.dtype), parameter="bias")]


class AdaptedExperts(Adapted):
    """Fused expert weights: each 3-D parameter W (E, out, in) of the module is replaced, while a forward runs, by W'.

    Reading `experts.gate_up_proj` on the adapted module gives the adapted weight, so whatever way the module
    multiplies (loop, batched, grouped) stays in use. That builds W' (the size of W) in each forward.
    """

    kind = "experts"

    @staticmethod
    def sites(name: str, layer: Any) -> list[Site]:
        sites = []
        for parameter, weight in layer._parameters.items():
            if _is_expert_weight(weight):
                shape = weight.shape if not getattr(layer, "is_transposed", False) else weight.mT.shape
                sites.append(
                    Site(f"{name}.{parameter}", "experts", tuple(shape), False, _delta_dtype(weight.dtype), parameter)
                )
        return sites

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if getattr(self, "is_transposed", False) else weight

    def from_matrix(self, W: Tensor) -> Tensor:
        return W.mT.contiguous() if getattr(self, "is_transposed", False) else W

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        route = self._rankfold.route
        plain = super(Adapted, self).forward  # type: ignore[misc]

        def one(name: str | None, *args: Any, **kwargs: Any) -> Tensor:
            # The loop over experts reads the whole parameter for each of them: what it reads is made once a forward.
            self.__dict__["_row_name"], self.__dict__["_made"] = name, {}
            try:
                return plain(*args, **kwargs)
            finally:
                del self.__dict__["_row_name"], self.__dict__["_made"]

        if isinstance(route, Rows):
            return route.apart(one, route.distinct, type(self).__name__, *args, **kwargs)
        return one(route, *args, **kwargs)

    def expert_weight(self, parameter: str) -> Tensor:
        """The weight as stored, or W' in its layout where the route names an adapter that has a delta on it."""
        made = self.__dict__.get("_made", {})
        if parameter not in made:
            made[parameter] = self._make_expert_weight(parameter)
        return made[parameter]

    def _make_expert_weight(self, parameter: str) -> Tensor:
        route = self.__dict__.get("_row_name", self._rankfold.route)
        deltas = self._modules.get(container(parameter))  # type: ignore[attr-defined]
        delta = deltas._modules.get(route) if deltas is not None and isinstance(route, str) else None
        if delta is None:
            return self._parameters[parameter]  # type: ignore[attr-defined]
        W = delta.W
        if delta.form == "factors":
            B, A = delta.pair()
            W = W + delta.scale * (B @ A).to(W.dtype)
        elif delta.form == "update":
            W = W + delta.update().to(W.dtype)
        else:
            W = delta.transform(W).to(W.dtype)
        if delta.strength is not None and delta.form != "factors":
            W = delta.W + delta.strength() * (W - delta.W)
        return W.mT if getattr(self, "is_transposed", False) else W


class AdaptedModule(Adapted):
    """Any module that an adapter trains in full: its copy takes its place while the adapter is active."""

    kind = "module"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self._rankfold.route
        plain = super(Adapted, self).forward  # type: ignore[misc]

        def one(name: str | None, *args: Any, **kwargs: Any) -> Any:
            copied = self.deltas._modules.get(name) if name is not None else None
            return (plain if copied is None else copied.module)(*args, **kwargs)  # type: ignore[operator,union-attr]

        if isinstance(route, Rows):
            return route.apart(one, route.distinct, type(self).__name__, *args, **kwargs)
        return one(route, *args, **kwargs)


class FullCopy(nn.Module):
    """A trainable copy of a whole module (`modules_to_save`)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        if adapted := [path for path, child in module.named_modules() if path and isinstance(child, Adapted)]:
            raise RankfoldError(
                f"a module whose part {adapted[0]} carries a delta cannot be trained in full too: "
                "detach that adapter first"
            )
        plain = module
        if isinstance(module, Adapted):  # another adapter's copy stands beside it, and must not be copied along
            plain = module._plain.__new__(module._plain)
            plain.__dict__.update(
                module.__dict__, _modules={k: m for k, m in module._modules.items() if not isinstance(m, Deltas)}
            )  # type: ignore[attr-defined]
            del plain.__dict__["_rankfold"]
        self.module = copy.deepcopy(plain).requires_grad_(True)
        for parameter in self.module.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def _per_row(gain: Tensor, h: Tensor) -> Tensor:
    """gain (rows, r) shaped to multiply h (rows, ..., r)."""
    return gain.to(h.dtype).reshape(gain.shape[0], *[1] * (h.dim() - 2), gain.shape[1])


def _stack(deltas: list[Any], rows: Rows) -> tuple[Tensor, Tensor]:
    """A (R, r, in) and B (R, out, r), scale folded in, of each row; zeros fill short ranks and None."""
    pairs = [None if delta is None else delta.pair() for delta in deltas]
    there = [pair for pair in pairs if pair is not None]
    r = max(A.shape[0] for _, A in there)
    if len(there) < len(pairs) or any(A.shape[0] != r for _, A in there):
        nothing = there[0][0][:, :0], there[0][1][:0]
        pairs = [_padded(*(pair or nothing), r) for pair in pairs]
    Bs, As = zip(*pairs, strict=True)  # type: ignore[arg-type]
    A, B = torch.stack(As), torch.stack(Bs)
    scales = [1.0 if delta is None else delta.scale for delta in deltas]
    if any(scale != 1 for scale in scales):
        B = B * torch.tensor(scales, dtype=B.dtype, device=B.device)[:, None, None]
    if len(deltas) < len(rows.names):
        index = rows.index.to(A.device)
        A, B = A.index_select(0, index), B.index_select(0, index)  # three times as fast as A[index]
    return A, B


def _padded(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - A.shape[0]
    return F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing))


def _delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """Deltas of 16-bit and quantised weights train in float32; otherwise in the weight's own dtype."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _is_expert_weight(weight: Tensor | None) -> bool:
    """A 3-D weight of several experts; a leading 1 is a class token or a table of positions."""
    return weight is not None and weight.dim() == 3 and weight.shape[0] > 1 and weight.is_floating_point()


def container(parameter: str) -> str:
    """The name under which a layer keeps the deltas of one of its parameters."""
    return "deltas" if parameter in ("weight", "bias") else f"deltas_{parameter}"


def kind_of(layer: nn.Module) -> type[Adapted] | None:
    """The mixin that adapts this layer, or None."""
    if isinstance(layer, Adapted):
        return layer._made_from[0]
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # `nn.MultiheadAttention` reads its weight and never calls it: a delta there would do nothing
    if isinstance(layer, nn.Linear):
        return AdaptedLinear
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(layer, transformers.Conv1D):
        return AdaptedConv1D
    if isinstance(layer, nn.Embedding):
        return AdaptedEmbedding
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and not layer.transposed:
        return AdaptedConv
    if isinstance(layer, nn.LayerNorm):
        return AdaptedNorm
    if any(map(_is_expert_weight, layer._parameters.values())):
        return AdaptedExperts
    return None


def as_matrix(site: Site, weight: Tensor) -> Tensor:
    """A dense weight of the site's layer, in its own layout, as W (out, in); the layer may be adapted or not."""
    mixin = kind_of(site.layer)
    assert mixin is not None
    return mixin.to_matrix(site.layer, weight)


@functools.cache
def adapted_class(mixin: type[Adapted], plain: type[nn.Module], experts: tuple[str, ...] = ()) -> type:
    """The class of an adapted layer: the mixin before the layer's own class.

    `experts` names the parameters of a fused-experts module that shall read as adapted.
    """
    properties = {name: property(functools.partial(AdaptedExperts.expert_weight, parameter=name)) for name in experts}
    members = {"__module__": plain.__module__, "_plain": plain, "_made_from": (mixin, plain, experts), **properties}
    return type(f"Adapted{plain.__name__}", (mixin, plain), members)  # type: ignore[call-overload]


def _rebuild(mixin: type[Adapted], plain: type[nn.Module], experts: tuple[str, ...]) -> Any:
    cls: Any = adapted_class(mixin, plain, experts)
    return cls.__new__(cls)


def adapt_layer(layer: Any, mixin: type[Adapted], sites: list[Site], state: State) -> None:
    """Exchange the layer's class for its adapted one and give it a place for the deltas of each site."""
    if not isinstance(layer, Adapted):
        bound = layer.__dict__.get("_old_forward", layer.__dict__.get("forward"))
        if bound is not None and getattr(bound, "__func__", None) is not type(layer).forward:
            raise UnsupportedError(
                f"the forward of a {type(layer).__name__} was replaced on the object; adapt it before that"
            )
        experts = tuple(site.parameter for site in mixin.sites("", layer)) if mixin is AdaptedExperts else ()
        name = sites[0].name if sites else type(layer).__name__
        if mixin is AdaptedEmbedding and layer.max_norm is not None:
            raise UnsupportedError(
                f"{name}: an embedding with max_norm rewrites its weight in every forward and cannot be adapted"
            )
        prepare(layer, name)
        layer._rankfold = state
        _change_class(layer, adapted_class(mixin, type(layer), experts))
    modules: dict[str, Any] = layer.__dict__["_modules"]
    for key in {container(site.parameter) for site in sites} or {"deltas"}:
        if key not in modules:
            modules[key] = Deltas(state)


def restore_layer(layer: Any) -> None:
    """Give the layer its own class back if it holds no delta any more."""
    containers = [name for name, module in layer._modules.items() if isinstance(module, Deltas)]
    in_use = any(layer._modules[name]._modules for name in containers)
    if "_rankfold" in layer.__dict__ and not in_use:
        for name in containers:
            del layer._modules[name]
        _change_class(layer, layer._plain)
        del layer.__dict__["_rankfold"]


def pack_layer(layer: Any, packed: PackedLinear) -> None:
    """Make an adapted linear layer a packed one; `unpack_layer` takes back everything but the weight itself."""
    unpack_layer(layer)
    own: dict[str, Any] = layer.__dict__
    attributes = {name: value for name, value in packed.__dict__.items() if name not in own}
    parameters = {name: tensor for name, tensor in packed._parameters.items() if name not in layer._parameters}
    own["_unpacked"] = layer._made_from, [*attributes], [*parameters], [*packed._buffers]
    own |= attributes
    layer._parameters |= {**parameters, "weight": packed.weight}
    layer._buffers |= packed._buffers
    _change_class(layer, adapted_class(layer._made_from[0], PackedLinear))


def unpack_layer(layer: Any) -> None:
    """Give a layer that `pack_layer` made the class and the attributes back that it had. Others are left alone."""
    if "_unpacked" not in layer.__dict__:
        return
    made_from, *added = layer.__dict__.pop("_unpacked")
    for names, held in zip(added, (layer.__dict__, layer._parameters, layer._buffers), strict=True):
        for name in names:
            del held[name]
    _change_class(layer, adapted_class(*made_from))


def change_plain(layer: Any, plain: type[nn.Module]) -> None:
    """Give a layer another class of its own, one with the same attributes; adapted it stays so, and packed."""
    if "_unpacked" in layer.__dict__:
        (kind, _, *more), *added = layer.__dict__["_unpacked"]
        layer.__dict__["_unpacked"] = (kind, plain, *more), *added
        return
    adapted = isinstance(layer, Adapted)
    _change_class(layer, adapted_class(layer._made_from[0], plain, *layer._made_from[2:]) if adapted else plain)


def home(site: Site) -> dict[str, Any]:
    """The deltas of a site by adapter name."""
    return site.layer._modules[container(site.parameter)]._modules


def _change_class(layer: Any, cls: type) -> None:
    """Give the layer another class. Accelerate's hooks keep the forward they found bound to the object: it follows."""
    before = type(layer).forward
    layer.__class__ = cls
    for key in ("_old_forward", "forward"):
        if getattr(layer.__dict__.get(key), "__func__", None) is before:
            layer.__dict__[key] = types.MethodType(cls.forward, layer)
