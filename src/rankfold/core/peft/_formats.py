"""How PEFT stores each method: names and layouts of its tensors, and its hyperparameters. One class a method."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from rankfold.core.adapter import Adapter
from rankfold.core.component import build
from rankfold.core.delta import Delta, Site
from rankfold.core.method import Method
from rankfold.core.peft._config import Ia3Options, LoraOptions, MissOptions, Options, RandLoraOptions, VeraOptions
from rankfold.core.peft._names import Names, check_pattern, name_list, name_pattern, only
from rankfold.errors import AdapterFileError, UnsupportedError


class Format:
    """A method of PEFT. `leaves` maps PEFT's name of a layer's tensor to ours, `shared` those that all layers share."""

    peft_type: ClassVar[str]
    slug: ClassVar[str]
    options: ClassVar[type[Options]]
    kinds: ClassVar[tuple[str, ...]]  # of layers that PEFT puts the method on
    leaves: ClassVar[dict[str, str]]
    shared: ClassVar[dict[str, str]] = {}

    # ---- reading

    def methods(self, options: Any, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        """Our hyperparameters: the adapter's, and each site's."""
        method = self.method(options)
        return method, {site.name: method for site in sites}

    def method(self, options: Any) -> Method:
        raise NotImplementedError

    def take_shared(self, adapter: Adapter, options: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors that all layers share, by PEFT's names."""

    def from_peft(self, own: str, tensor: Tensor, like: Tensor, delta: Delta) -> Tensor:
        """PEFT's tensor in our layout; `like` has our shape."""
        return tensor.reshape(like.shape)

    # ---- writing

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        """PEFT's options, for a model with modules at the paths `everything`.

        Raises UnsupportedError where PEFT cannot say the same.
        """
        raise NotImplementedError

    def groups(self, adapter: Adapter) -> list[list[str]]:
        """The sites that no short name may mix."""
        return [list(adapter.deltas)]

    def tensors(self, delta: Delta) -> dict[str, Tensor]:
        """A site's tensors by our names."""
        return {name: parameter.detach() for name, parameter in delta.named_parameters(recurse=False)}

    def shared_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors that all layers share, by PEFT's names."""
        return {}

    def refusal(self, site: Site) -> str | None:
        """Why PEFT's version of the method cannot do the same on this layer; None if it can."""
        if site.kind not in self.kinds:
            return f"PEFT puts it on {', '.join(self.kinds)} only, and this is {site.kind}"
        return None

    # ---- both

    def leaf(self, own: str, site: Site) -> str:
        """PEFT's name of one of our tensors."""
        return next(leaf for leaf, name in self.leaves.items() if name == own)

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        """Our tensor in PEFT's layout."""
        return tensor


class Lora(Format):
    """A, B are (r, in), (out, r) except: a convolution's A has its kernel's shape, B a kernel of 1; of
    fused experts all A stand one below the other, and B's columns run over rank, then expert."""

    peft_type = "LORA"
    slug = "lora"
    options = LoraOptions
    kinds = ("linear", "conv1d", "embedding", "conv", "experts")
    leaves: ClassVar = {
        "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "m"
    }  # fmt: skip

    def methods(self, options: LoraOptions, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        def at(rank: int, alpha: float) -> Method:
            return build(
                self.slug, rank=rank, alpha=float(alpha), rslora=options.use_rslora, dropout=options.lora_dropout
            )

        own = {s.name: at(names.rank(s.name, options.r), names.alpha(s.name, options.lora_alpha)) for s in sites}
        return at(options.r, options.lora_alpha), own

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        methods: list[Any] = [adapter.methods.get(site, adapter.method) for site in adapter.deltas]
        if len({method.dropout for method in methods}) > 1:
            raise UnsupportedError(f"adapter {adapter.name!r} has several dropouts, and PEFT has one for all layers")
        rslora = methods[0].rslora
        ranks, alphas = {}, {}
        for (site, delta), method in zip(adapter.deltas.items(), methods, strict=True):
            ranks[site] = rank = delta.pair(on_base=True)[1].shape[-2]
            same = method.rank == rank and method.rslora == rslora
            alpha = (
                (method.rank if method.alpha is None else method.alpha)
                if same
                else delta.scale * rank ** (0.5 if rslora else 1)
            )
            alphas[site] = int(alpha) if alpha == int(alpha) else alpha
        r, lora_alpha = _commonest(ranks, adapter.method.rank), _commonest(alphas, adapter.method.alpha)  # type: ignore[attr-defined]
        experts = any(site.kind == "experts" for site in adapter.sites)
        return {
            "r": r,
            "lora_alpha": lora_alpha,
            "use_rslora": rslora,
            "use_dora": self.slug == "dora",
            "lora_dropout": 0.0 if experts else methods[0].dropout,  # PEFT cannot drop out in front of fused experts
            "rank_pattern": {only(site): rank for site, rank in ranks.items() if rank != r},
            "alpha_pattern": {only(site): alpha for site, alpha in alphas.items() if alpha != lora_alpha},
            "bias": "none",
            "fan_in_fan_out": any(site.kind == "conv1d" for site in adapter.sites),
            "init_lora_weights": True,
        }

    def tensors(self, delta: Delta) -> dict[str, Tensor]:
        B, A = delta.pair(on_base=True)  # with an offset, the plain LoRA of rank 2r that does the same
        return {**super().tensors(delta), "A": A.detach(), "B": B.detach()}

    def refusal(self, site: Site) -> str | None:
        layer = site.layer
        if site.kind == "conv" and (
            layer.groups != 1 or any(d != 1 for d in layer.dilation) or layer.padding_mode != "zeros"
        ):
            return "PEFT convolves with lora_A without the layer's groups, dilation and padding mode: another change"
        return super().refusal(site)

    def leaf(self, own: str, site: Site) -> str:
        if own == "m":
            return "lora_magnitude_vector"
        return f"lora_embedding_{own}" if site.kind == "embedding" else f"lora_{own}.weight"

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        site = delta.site
        if site.kind == "experts":
            return tensor.flatten(0, 1) if own == "A" else tensor.permute(1, 2, 0).flatten(1)
        if site.kind == "conv":
            ones = [1] * (site.stored.dim() - 2)
            shapes = {"A": (-1, *site.stored.shape[1:]), "B": (*tensor.shape, *ones), "m": (1, -1, *ones)}
            return tensor.reshape(shapes[own])
        return tensor

    def from_peft(self, own: str, tensor: Tensor, like: Tensor, delta: Delta) -> Tensor:
        if delta.site.kind == "experts" and own == "B":
            return tensor.unflatten(1, (-1, delta.site.count)).permute(2, 0, 1)
        return tensor.reshape(like.shape)


class Dora(Lora):
    """LoRA's, with the magnitude beside it."""

    slug = "dora"
    kinds = ("linear", "conv1d", "embedding", "conv")


class Vera(Format):
    """The file holds the random pair, of the largest sizes among the layers, or PEFT's seed alone brings it back."""

    peft_type = "VERA"
    slug = "vera"
    options = VeraOptions
    kinds = ("linear", "conv1d")
    leaves: ClassVar = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    shared: ClassVar = {"vera_A": "A", "vera_B": "B"}

    def method(self, options: VeraOptions) -> Method:
        return build("vera", rank=options.r, dropout=options.vera_dropout, d_initial=options.d_initial)

    def take_shared(self, adapter: Adapter, options: VeraOptions, tensors: Mapping[str, Tensor]) -> None:
        if not options.save_projection:
            return  # ours from the same seed is PEFT's, up to the rounding of float32
        (r, wide), (tall, _) = _shared(adapter).A.shape, _shared(adapter).B.shape
        A, B = tensors["vera_A"], tensors["vera_B"]
        _at_least("vera_A", A, (r, wide), exactly=(0,))
        _at_least("vera_B", B, (tall, r), exactly=(1,))
        _shared(adapter).keep(A=A[:, :wide], B=B[:tall])

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        method: Any = _one_method(adapter)
        return {
            "r": method.rank,
            "vera_dropout": method.dropout,
            "d_initial": method.d_initial,
            "projection_prng_key": adapter.seed,
            "save_projection": True,
            "bias": "none",
        }

    def shared_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        return {"vera_A": _shared(adapter).A, "vera_B": _shared(adapter).B}


class Ia3(Format):
    peft_type = "IA3"
    slug = "ia3"
    options = Ia3Options
    kinds = ("linear", "conv1d", "conv")
    leaves: ClassVar = {"ia3_l": "l"}

    def methods(self, options: Ia3Options, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        given = options.feedforward_modules
        if given is None:
            raise AdapterFileError(
                "'feedforward_modules' is missing: it says which layers have their gain on the input"
            )
        if isinstance(given, str):
            check_pattern(given)
            on_input = [site.name for site in sites if re.fullmatch(given, site.name)]
        else:  # PEFT asks for no dot before a listed name
            on_input = [site.name for site in sites if site.name.endswith(tuple(given))]
        method: Any = build("ia3", feedforward=given if isinstance(given, str) else tuple(given))
        if [site.name for site in sites if method.on_input(site)] != on_input:
            method = build("ia3", feedforward=name_pattern(on_input))
        return method, {site.name: method for site in sites}

    def groups(self, adapter: Adapter) -> list[list[str]]:
        on_input = [s.name for s in adapter.sites if adapter.methods.get(s.name, adapter.method).on_input(s)]  # type: ignore[attr-defined]
        return [on_input, [site for site in adapter.deltas if site not in on_input]]

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        on_input, others = self.groups(adapter)
        listed = name_list(on_input, everything)
        clear = not any(other.endswith(tuple(listed)) for other in others)
        return {"feedforward_modules": listed if clear else name_pattern(on_input)}

    def refusal(self, site: Site) -> str | None:
        if site.kind == "conv" and site.stored.dim() != 4:
            return "PEFT has it for two-dimensional convolutions only"
        return super().refusal(site)

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        if delta.site.kind == "conv":
            return tensor[None, :, None, None]
        on_input = type(delta).inputs is not Delta.inputs
        return tensor[None] if on_input else tensor[:, None]


class RandLora(Format):
    """Both sides flatten base and rank into one dimension, in orders that pair B's columns with other gains:
    our column `j·r + k` is PEFT's column `k·n + j`. With as many bases n in every layer one order of B serves all."""

    peft_type = "RANDLORA"
    slug = "randlora"
    options = RandLoraOptions
    kinds = ("linear", "conv1d")
    leaves: ClassVar = {"randlora_lambda": "Lambda", "randlora_gamma": "Gamma"}
    shared: ClassVar = {"randlora_A": "A", "randlora_B": "B"}

    def method(self, options: RandLoraOptions) -> Method:
        basis = "very-sparse" if options.very_sparse else "sparse" if options.sparse else "uniform"
        return build(
            "randlora",
            rank=options.r,
            alpha=float(options.randlora_alpha),
            scaling="rank",
            basis=basis,
            dropout=options.randlora_dropout,
        )

    def take_shared(self, adapter: Adapter, options: RandLoraOptions, tensors: Mapping[str, Tensor]) -> None:
        if not options.save_projection:
            raise UnsupportedError(
                "it was saved without its random bases, which PEFT draws in another way: save it with save_projection"
            )
        n, (r, d), D = self._bases(adapter), _shared(adapter).A.shape, _shared(adapter).B.shape[0]
        A, B = tensors["randlora_A"], tensors["randlora_B"]
        _at_least("randlora_A", A, (r, 1, d), exactly=(0, 1))
        _at_least("randlora_B", B, (D, n, r), exactly=(2,))
        B = B[:D, :n].reshape(D, r, n).mT.flatten(1)
        _shared(adapter).keep(A=A[:, 0, :d].contiguous(), B=B)

    def from_peft(self, own: str, tensor: Tensor, like: Tensor, delta: Delta) -> Tensor:
        return tensor.mT if own == "Lambda" else tensor

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        method: Any = _one_method(adapter)
        self._bases(adapter)
        alpha = next(iter(adapter.deltas.values())).scale * method.rank
        return {
            "r": method.rank,
            "randlora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "randlora_dropout": method.dropout,
            "sparse": method.basis == "sparse",
            "very_sparse": method.basis == "very-sparse",
            "projection_prng_key": adapter.seed,
            "save_projection": True,
            "bias": "none",
        }

    def shared_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        A, B, n = _shared(adapter).A, _shared(adapter).B, self._bases(adapter)
        r, d = A.shape
        B = B.reshape(-1, n, r).mT.reshape(-1, n, r)
        # PEFT sizes the bases by the largest `in` and `out` of any layer, we by those of one: the rest is never read.
        widest = min(max(site.in_ for site in adapter.sites), max(site.out for site in adapter.sites))
        more = -(-widest // r) - n
        return {"randlora_A": F.pad(A, (0, widest - d))[:, None], "randlora_B": F.pad(B, (0, 0, 0, more))}

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        return tensor.mT if own == "Lambda" else tensor

    def _bases(self, adapter: Adapter) -> int:
        """n, the same in every layer."""
        n = {delta.Lambda.shape[-2] for delta in _deltas(adapter)}
        if len(n) > 1:
            raise UnsupportedError(
                f"its layers have different numbers of random bases ({', '.join(map(str, sorted(n)))}), and PEFT pairs "
                "them with their gains in another order in each: only layers whose shorter sides are equal go together"
            )
        return n.pop()


class Miss(Format):
    """MiSS: PEFT's with `init_weights=True`, or "mini" for a D that is repeated along the outputs."""

    peft_type = "MISS"
    slug = "miss"
    options = MissOptions
    kinds = ("linear",)
    leaves: ClassVar = {"miss_block": "D"}

    def method(self, options: MissOptions) -> Method:
        mini = options.mini_r if options.init_weights == "mini" else None
        return build("miss", rank=options.r, mini=mini, dropout=options.miss_dropout)

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        ranks = {delta.D.shape[-2] for delta in _deltas(adapter)}
        methods: list[Any] = [adapter.methods.get(site, adapter.method) for site in adapter.deltas]
        forms = {(method.mini, method.dropout) for method in methods}
        if len(ranks) > 1 or len(forms) > 1:
            raise UnsupportedError("PEFT's MiSS has one rank, one form and one dropout for all layers")
        mini, dropout = forms.pop()
        form = {"init_weights": True} if mini is None else {"init_weights": "mini", "mini_r": mini}
        return {"r": ranks.pop(), "miss_dropout": dropout, "bias": "none", **form}


class Bone(Miss):
    """Bone: PEFT's MiSS with `init_weights="bat"`, or with True for the later form."""

    slug = "bone"

    def method(self, options: MissOptions) -> Method:
        if options.miss_dropout:
            warnings.warn(
                f"miss_dropout={options.miss_dropout} is left out: bat has no dropout; nothing else differs",
                stacklevel=4,
            )
        return build("bone", rank=options.r, variant="bat")

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        ranks = {delta.D.shape[-2] for delta in _deltas(adapter)}
        variants = {adapter.methods.get(site, adapter.method).variant for site in adapter.deltas}  # type: ignore[attr-defined]
        if len(ranks) > 1 or len(variants) > 1:
            raise UnsupportedError("PEFT's MiSS has one rank and one form for all layers")
        return {"r": ranks.pop(), "init_weights": "bat" if variants == {"bat"} else True, "bias": "none"}


_FORMATS: tuple[Format, ...] = (Lora(), Dora(), Vera(), Ia3(), RandLora(), Miss(), Bone())
WRITTEN: dict[str, Format] = {each.slug: each for each in _FORMATS}
OPTIONS: dict[str, type[Options]] = {each.peft_type: each.options for each in _FORMATS}


def format_of(options: Options) -> Format:
    """The format of a file with these options."""
    if getattr(options, "use_dora", False):
        return WRITTEN["dora"]
    if options.peft_type == "MISS" and getattr(options, "init_weights", None) == "bat":
        return WRITTEN["bone"]
    return next(f for f in _FORMATS if f.peft_type == options.peft_type)


def _deltas(adapter: Adapter) -> Iterable[Any]:
    return adapter.deltas.values()


def _shared(adapter: Adapter) -> Any:
    return adapter.shared


def _commonest(values: Mapping[str, Any], preferred: Any) -> Any:
    """The value most sites have, so that few patterns are needed; among equals the preferred one."""
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value == preferred))


def _one_method(adapter: Adapter) -> Method:
    """The method of all layers, which is all that PEFT's configuration has room for."""
    if adapter.methods:
        site = next(iter(adapter.methods))
        raise UnsupportedError(
            f"{site} has hyperparameters of its own, and PEFT has one set for all layers of a {adapter.method.slug}"
        )
    return adapter.method


def _at_least(name: str, tensor: Tensor, shape: tuple[int, ...], exactly: tuple[int, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        size == needed if i in exactly else size >= needed
        for i, (size, needed) in enumerate(zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        raise AdapterFileError(f"{name} has shape {tuple(tensor.shape)}, and the layers need {shape}")
