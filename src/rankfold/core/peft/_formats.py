"""How PEFT stores each method: names and layouts of its tensors, and its hyperparameters. One class a method."""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.core.adapter import Adapter
from rankfold.core.component import build
from rankfold.core.delta import Delta, Site
from rankfold.core.method import Method
from rankfold.core.peft._config import (
    AdaLoraOptions,
    BoftOptions,
    FourierOptions,
    Ia3Options,
    LohaOptions,
    LokrOptions,
    LoraOptions,
    MissOptions,
    OftOptions,
    Options,
    RandLoraOptions,
    VeraOptions,
)
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

    def as_stored(self, options: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """The options, as the shapes of a layer's tensors by PEFT's names correct them."""
        return options

    def without_rank(self, options: Any) -> set[str]:
        """Layers of which the file holds tensors without numbers, because nothing of the adapter is left there."""
        return set()

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
        if site.kind == "conv" and not _plain(site.layer):
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


class Oft(Format):
    """PEFT fits its block size to a layer in its own way: to the nearest divisor of `in`."""

    peft_type = "OFT"
    slug = "oft"
    options = OftOptions
    kinds = ("linear",)  # in a convolution PEFT rotates patches and folds them: not what it merges
    leaves: ClassVar = {"oft_R": "q"}

    def methods(self, options: OftOptions, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        if (options.r == 0) == (options.oft_block_size == 0):
            raise AdapterFileError("one of 'r' and 'oft_block_size' must be 0, and the other must not")
        terms = max(options.num_cayley_neumann_terms, 4) if options.use_cayley_neumann else None  # 3 are computed as 4
        if terms and options.num_cayley_neumann_terms < 3:
            raise UnsupportedError("'num_cayley_neumann_terms' under 3 is no series of the rotation")
        if terms and _version(options.peft_version) < (0, 18):
            raise UnsupportedError("'use_cayley_neumann' was another series before PEFT 0.18, and this file is older")
        sizes = {site.name: _block(site.in_, options.r, options.oft_block_size) for site in sites}
        if ones := [name for name, size in sizes.items() if size == 1]:
            raise UnsupportedError(f"{ones[0]} has blocks of 1, and nothing to train: leave it out")
        own: dict[str, Method] = {name: build("oft", block_size=size, neumann=terms) for name, size in sizes.items()}
        return next(iter(own.values())), own

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        sizes = {(delta.site.in_, delta.size) for delta in _deltas(adapter)}
        same_size = [(0, size) for size in sorted({32, *(size for _, size in sizes)}, reverse=True)]
        same_number = [(in_ // size, 0) for in_, size in sizes]
        fitting = (c for c in same_size + same_number if all(_block(in_, *c) == size for in_, size in sizes))
        chosen, terms = next(fitting, None), {delta.terms for delta in _deltas(adapter)}
        if chosen is None or len(terms) > 1:
            raise UnsupportedError("PEFT has one block size and one series for all layers: name a block_size")
        n = terms.pop()
        if n in (2, 3):
            raise UnsupportedError(f"PEFT has no Neumann series of {n} terms: take 4 or more")
        return {
            "r": chosen[0],
            "oft_block_size": chosen[1],
            "use_cayley_neumann": n > 0,
            "num_cayley_neumann_terms": n or 5,
            "peft_version": "0.18.0",  # whose series it is
            "bias": "none",
        }

    def leaf(self, own: str, site: Site) -> str:
        return "oft_R.weight"

    def to_peft(self, own: str, tensor: Tensor, delta: Any) -> Tensor:
        return -tensor if delta.terms else tensor  # PEFT's series is that of the opposite rotation

    def from_peft(self, own: str, tensor: Tensor, like: Tensor, delta: Delta) -> Tensor:
        return self.to_peft(own, tensor, delta)


class Boft(Format):
    """Without its CUDA kernel PEFT makes one butterfly factor, whatever number its configuration says."""

    peft_type = "BOFT"
    slug = "boft"
    options = BoftOptions
    kinds = ("linear", "conv")
    leaves: ClassVar = {"boft_R": "R", "boft_s": "s"}

    def as_stored(self, options: BoftOptions, shapes: Mapping[str, tuple[int, ...]]) -> BoftOptions:
        made_without = shapes.get("boft_R", ())[:1] == (1,)
        return options.model_copy(update={"boft_n_butterfly_factor": 1}) if made_without else options

    def methods(self, options: BoftOptions, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        b, number = options.boft_block_size, options.boft_block_num
        if (b == 0) == (number == 0):
            raise AdapterFileError("one of 'boft_block_size' and 'boft_block_num' must be 0, and the other must not")
        _left_out("boft_dropout", options.boft_dropout)
        sizes = {site.name: b or site.in_ // number for site in sites}
        if small := [name for name, size in sizes.items() if size < 2]:
            raise UnsupportedError(f"{small[0]} has blocks of {sizes[small[0]]}, which cannot turn: leave it out")
        m = options.boft_n_butterfly_factor
        own: dict[str, Method] = {name: build("boft", block_size=size, m=m) for name, size in sizes.items()}
        return next(iter(own.values())), own

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        factors, numbers, sizes = ({delta.R.shape[i] for delta in _deltas(adapter)} for i in (0, 1, 2))
        if len(factors) > 1 or (len(sizes) > 1 and len(numbers) > 1):
            raise UnsupportedError("PEFT's BOFT has one block size and one number of factors for all layers")
        if factors != {1}:
            warnings.warn("PEFT reads several butterfly factors only where its CUDA kernel compiles", stacklevel=4)
        return {
            "boft_block_size": max(sizes) if len(sizes) == 1 else 0,
            "boft_block_num": 0 if len(sizes) == 1 else max(numbers),
            "boft_n_butterfly_factor": max(factors),
            "bias": "none",
        }

    def refusal(self, site: Site) -> str | None:
        layer = site.layer
        if site.kind == "conv" and not (
            _plain(layer)
            and site.stored.dim() == 4
            and all(len(set(sizes)) == 1 for sizes in (layer.kernel_size, layer.stride, layer.padding))
        ):
            return "PEFT has it for square two-dimensional convolutions only, without groups, dilation and padding mode"
        return super().refusal(site)

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        if own == "R":
            return tensor
        return tensor[None] if delta.site.kind == "conv" else tensor[:, None]


class Lycoris(Format):
    """What LoHa and LoKr have in common: a rank and an alpha that patterns change, by the name of a layer."""

    kinds = ("linear", "conv")

    def methods(self, options: Any, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        _left_out("rank_dropout", options.rank_dropout)
        _left_out("module_dropout", options.module_dropout)

        def at(rank: int, alpha: float) -> Method:
            return build(self.slug, rank=rank, alpha=float(alpha), **self.form(options))

        own = {s.name: at(names.rank(s.name, options.r), names.alpha(s.name, options.alpha)) for s in sites}
        return at(options.r, options.alpha), own

    def form(self, options: Any) -> dict[str, Any]:
        """Our hyperparameters beside rank and alpha."""
        return {}

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        methods: dict[str, Any] = {site: adapter.methods.get(site, adapter.method) for site in adapter.deltas}
        ranks = {site: method.rank for site, method in methods.items()}
        alphas = {site: method.rank if method.alpha is None else method.alpha for site, method in methods.items()}
        alphas = {site: int(alpha) if alpha == int(alpha) else alpha for site, alpha in alphas.items()}
        r, alpha = _commonest(ranks, None), _commonest(alphas, None)
        return {
            "r": r,
            "alpha": alpha,
            "rank_pattern": {only(site): rank for site, rank in ranks.items() if rank != r},
            "alpha_pattern": {only(site): each for site, each in alphas.items() if each != alpha},
        }

    def refusal(self, site: Site) -> str | None:
        if site.kind == "conv" and site.layer.padding_mode != "zeros":
            return "PEFT convolves without the layer's padding mode"
        return super().refusal(site)


class Loha(Lycoris):
    peft_type = "LOHA"
    slug = "loha"
    options = LohaOptions
    leaves: ClassVar = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}


class Lokr(Lycoris):
    """A whole D of a convolution has its kernel's shape."""

    peft_type = "LOKR"
    slug = "lokr"
    options = LokrOptions
    leaves: ClassVar = {
        "lokr_w1": "C", "lokr_w1_a": "C_b", "lokr_w1_b": "C_a", "lokr_w2": "D", "lokr_w2_a": "D_b", "lokr_w2_b": "D_a"
    }  # fmt: skip

    def form(self, options: LokrOptions) -> dict[str, Any]:
        factor = options.decompose_factor
        return {"factor": None if factor == -1 else factor, "decompose_both": options.decompose_both}

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        methods: list[Any] = [adapter.methods.get(site, adapter.method) for site in adapter.deltas]
        forms = {(method.factor, method.decompose_both) for method in methods}
        if len(forms) > 1:
            raise UnsupportedError("PEFT's LoKr has one factor and one decompose_both for all layers")
        factor, both = forms.pop()
        own = {"decompose_factor": -1 if factor is None else factor, "decompose_both": both}
        return super().hyperparameters(adapter, everything) | own

    def refusal(self, site: Site) -> str | None:
        if site.kind == "conv" and site.stored.dim() != 4:
            return "in a one-dimensional convolution PEFT multiplies other dimensions with one another"
        return super().refusal(site)

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        if own == "D" and delta.site.kind == "conv":
            return tensor.unflatten(1, (-1, *delta.site.stored.shape[2:]))
        return tensor


class FourierFT(Format):
    """PEFT finds the places of the entries again from its seed, as we do."""

    peft_type = "FOURIERFT"
    slug = "fourierft"
    options = FourierOptions
    kinds = ("linear", "conv1d")
    leaves: ClassVar = {"fourierft_spectrum": "c"}

    def methods(self, options: FourierOptions, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        def at(n: int) -> Method:
            return build("fourierft", n=n, alpha=options.scaling, entry_seed=options.random_loc_seed)

        own = {site.name: at(names.frequencies(site.name, options.n_frequency)) for site in sites}
        return at(options.n_frequency), own

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        methods: list[Any] = [adapter.methods.get(site, adapter.method) for site in adapter.deltas]
        forms = {(method.alpha, method.entry_seed) for method in methods}
        if len(forms) > 1:
            raise UnsupportedError("PEFT's FourierFT has one scaling and one seed for all layers")
        scaling, seed = forms.pop()
        numbers = {site: len(delta.places) for site, delta in adapter.deltas.items()}  # type: ignore[attr-defined]
        n = _commonest(numbers, None)
        config = {
            "n_frequency": n,
            "n_frequency_pattern": {site: number for site, number in numbers.items() if number != n},
            "scaling": scaling,
            "random_loc_seed": seed,
            "fan_in_fan_out": any(site.kind == "conv1d" for site in adapter.sites),
            "bias": "none",
        }
        if any(Names(config).frequencies(site, n) != number for site, number in numbers.items()):
            raise UnsupportedError("PEFT's n_frequency_pattern cannot tell these layers apart: give them one n")
        return config


class AdaLora(Format):
    """PEFT divides alpha by `init_r + 1e-5`, also where a layer kept fewer components than init_r."""

    peft_type = "ADALORA"
    slug = "adalora-svd"
    options = AdaLoraOptions
    kinds = ("linear", "conv1d", "conv")
    leaves: ClassVar = {"lora_A": "A", "lora_B": "B", "lora_E": "lam"}

    def methods(self, options: AdaLoraOptions, names: Names, sites: Sequence[Site]) -> tuple[Method, dict[str, Method]]:
        alpha = options.lora_alpha if options.lora_alpha > 0 else options.init_r
        scale = alpha / (options.init_r + 1e-5)
        kept = self.kept(options)

        def at(rank: int) -> Method:
            return build("adalora-svd", rank=rank, alpha=scale * rank, dropout=options.lora_dropout)

        return at(options.init_r), {site.name: at(kept.get(site.name, options.init_r)) for site in sites}

    def kept(self, options: AdaLoraOptions) -> dict[str, int]:
        """How many components each layer in the pattern kept."""
        return {name.partition(".lora_E")[0]: sum(mask) for name, mask in (options.rank_pattern or {}).items()}

    def without_rank(self, options: AdaLoraOptions) -> set[str]:
        return {path for path, rank in self.kept(options).items() if rank == 0}

    def hyperparameters(self, adapter: Adapter, everything: Sequence[str]) -> dict[str, Any]:
        methods: list[Any] = [adapter.methods.get(site, adapter.method) for site in adapter.deltas]
        forms = {(f"{method.scale:.12g}", method.dropout) for method in methods}
        if len(forms) > 1:
            raise UnsupportedError("PEFT's AdaLoRA has one scale and one dropout for all layers")
        ranks = {site: delta.pair(on_base=True)[1].shape[-2] for site, delta in adapter.deltas.items()}
        r = max(ranks.values())
        alpha = float(f"{methods[0].scale * (r + 1e-5):.12g}")
        kept = {f"{site}.lora_E": [i < rank for i in range(r)] for site, rank in ranks.items() if rank != r}
        return {
            "init_r": r,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": methods[0].dropout,
            "rank_pattern": kept or None,
            "total_step": 1,  # PEFT asks for a schedule even where nothing is trained
            "fan_in_fan_out": any(site.kind == "conv1d" for site in adapter.sites),
            "init_lora_weights": True,
            "bias": "none",
        }

    def tensors(self, delta: Any) -> dict[str, Tensor]:
        own = super().tensors(delta)
        if "A0" in delta._buffers:  # a start taken out of the base: r more components, of size −1
            B0, A0 = delta.B0, delta.A0
            own = {
                "B": torch.cat([own["B"], B0], -1),
                "lam": torch.cat([own["lam"], -torch.ones_like(A0[..., 0])], -1),
                "A": torch.cat([own["A"], A0], -2),
            }
        return own

    def refusal(self, site: Site) -> str | None:
        if site.kind == "conv" and not (_plain(site.layer) and site.stored.dim() == 4):
            return "PEFT has it for two-dimensional convolutions only, without groups, dilation and padding mode"
        return super().refusal(site)

    def to_peft(self, own: str, tensor: Tensor, delta: Delta) -> Tensor:
        return tensor[:, None] if own == "lam" else tensor


_FORMATS: tuple[Format, ...] = (
    Lora(), Dora(), Vera(), Ia3(), RandLora(), Miss(), Bone(), Oft(), Boft(), Loha(), Lokr(), FourierFT(), AdaLora()
)  # fmt: skip
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


def _left_out(name: str, dropout: float) -> None:
    if dropout:
        warnings.warn(
            f"{name}={dropout} is left out: there is no such dropout here; nothing else differs", stacklevel=6
        )


def _plain(layer: Any) -> bool:
    """Whether a convolution has no groups, no dilation and pads with zeros."""
    return layer.groups == 1 and all(d == 1 for d in layer.dilation) and layer.padding_mode == "zeros"


@functools.cache
def _block(size: int, number: int, wanted: int) -> int:
    """PEFT's block size for a side: into a number of blocks, or of a size wanted, either as near as divisors come."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - min(number or wanted, size)), d))
    return size // nearest if number else nearest


def _version(text: str | None) -> tuple[int, ...]:
    """A version's first two numbers; PEFT writes its own since 0.18."""
    return tuple(map(int, re.findall(r"\d{1,9}", text or "0.0")[:2]))


def _at_least(name: str, tensor: Tensor, shape: tuple[int, ...], exactly: tuple[int, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        size == needed if i in exactly else size >= needed
        for i, (size, needed) in enumerate(zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        raise AdapterFileError(f"{name} has shape {tuple(tensor.shape)}, and the layers need {shape}")
