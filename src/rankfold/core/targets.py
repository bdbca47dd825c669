"""Which submodules an adapter sits on: words, suffixes, regular expressions, callables."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from rankfold.core.delta import Site
from rankfold.core.layers import Adapted, AdaptedConv1D, AdaptedLinear, kind_of
from rankfold.errors import RankfoldError

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]
Everything = dict[str, tuple[nn.Module, type[Adapted] | None]]
WORDS = ("all-linear", "attention", "mlp", "biases")
_HEADS = {"lm_head", "embed_out", "head", "classifier", "score", "qa_outputs", "output_projection"}
_ATTENTION = re.compile(
    r"(^|[._])(self_?attn|attn|attention|selfattention|encdecattention|crossattention)([._]|$)", re.IGNORECASE
)
_LAYER = re.compile(r"^(?:(?:deltas|modules)\.(?=.))?((?:.*?\.)??\d+)\.")


class Target:
    """One matched site: `site` with its layer, and the mixin that adapts it."""

    def __init__(self, site: Site, mixin: type[Adapted], path: str, layer: nn.Module):
        self.site, self.mixin, self.path, self.layer = site, mixin, path, layer
        site.layer = layer


def find(model: nn.Module, targets: Targets) -> list[Target]:
    """The sites of the model that `targets` names, in model order, each layer once however often it is shared.

    - `"all-linear"`: every linear layer but the output head; `"attention"`, `"mlp"`: those inside attention, and the
      others inside the repeated blocks; `"biases"`: everything that has a bias;
    - another string: a regular expression for the whole path; a list: path suffixes (`"q_proj"`, `"0.mlp.down_proj"`);
    - a callable `(path, module) -> bool`.

    Fused expert weights (3-D parameters) are sites of their own (`...experts.gate_up_proj`) that are matched by name,
    not by the words. Raises RankfoldError where nothing matches, and lists what there is.
    """
    everything = _everything(model)
    chosen: list[Target] = []
    unsupported: list[str] = []
    matches = _matcher(model, targets, everything)
    if not isinstance(targets, str) and not callable(targets):
        _check_suffixes(targets, everything)
    for name, (module, mixin) in everything.items():
        if mixin is None:
            if name and not callable(targets) and matches(name, module):
                unsupported.append(f"{name} ({type(module).__name__})")
            continue
        for site in mixin.sites(name, module):
            if matches(site.name, module):
                chosen.append(Target(site, mixin, name, module))
    if not chosen:
        leaves = sorted({name.rsplit(".", 1)[-1] for name, (_, mixin) in everything.items() if name and mixin})
        what = f"; it matches only {', '.join(unsupported[:5])}, which no delta can sit on" if unsupported else ""
        what += f"; by the name of a layer it is a list: [{targets}]" if targets in leaves else ""
        raise RankfoldError(
            f"targets={targets!r} matches no layer of {type(model).__name__} that can be adapted{what}. "
            f"There are layers called {', '.join(leaves) or 'nothing that can be adapted'}; words: {', '.join(WORDS)}"
        )
    return chosen


def site_at(model: nn.Module, name: str) -> Target | None:
    """The site of that name: a layer's path, or behind the path of fused experts the parameter's name."""
    for path in (name, name.rpartition(".")[0]):
        layer = submodule(model, path) if path else None
        mixin = None if layer is None else kind_of(layer)
        for site in () if mixin is None else mixin.sites(path, layer):
            if site.name == name:
                return Target(site, mixin, path, layer)  # type: ignore[arg-type]
    return None


def _check_suffixes(suffixes: Sequence[str], everything: Everything) -> None:
    """Refuse a list in which a name is that of no layer, which a wrong letter would otherwise leave out in silence."""
    paths = [
        site.name for name, (module, mixin) in everything.items() if mixin for site in mixin.sites(name, module)
    ] + list(everything)
    missing = [s for s in suffixes if not any(path == s or path.endswith(f".{s}") for path in paths)]
    if missing and len(missing) < len(suffixes):
        there = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths if path}))
        raise RankfoldError(f"targets: no layer is called {', '.join(map(repr, missing))}; there are: {there}")


def inside_adapter(name: str) -> bool:
    return "deltas" in name and any(part == "deltas" or part.startswith("deltas_") for part in name.split("."))


def _everything(model: nn.Module) -> Everything:
    """The modules of the base model by path, each with the mixin that adapts it."""
    return {name: (module, kind_of(module)) for name, module in model.named_modules() if not inside_adapter(name)}


def _matcher(model: nn.Module, targets: Targets, everything: Everything) -> Callable[[str, nn.Module], bool]:
    if callable(targets):
        return targets
    if isinstance(targets, str):
        if targets == "biases":
            return lambda name, module: getattr(module, "bias", None) is not None
        if targets in WORDS:
            linear = _all_linear(model, everything)
            if targets == "attention":
                linear = {name for name in linear if _ATTENTION.search(name)}
            elif targets == "mlp":
                linear = {name for name in linear if not _ATTENTION.search(name) and re.search(r"(^|\.)\d+\.", name)}
            return lambda name, module: name in linear
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise RankfoldError(
                f"targets={targets!r} is neither one of {', '.join(WORDS)} nor a regular expression: {error}"
            ) from None
        return lambda name, module: pattern.fullmatch(name) is not None
    suffixes = list(targets)
    if not suffixes or not all(isinstance(suffix, str) for suffix in suffixes):
        raise RankfoldError(
            f"targets={targets!r}: give a word, a regular expression, a callable or a list of name suffixes"
        )
    return lambda name, module: any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def all_linear(model: Any) -> set[str]:
    """Paths of all linear layers but the output head (the layers outside a Transformers model's base model)."""
    return _all_linear(model, _everything(model))


def _all_linear(model: Any, everything: Everything) -> set[str]:
    backbone = getattr(model, "base_model", model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    within = next((f"{name}." for name, (module, _) in everything.items() if name and module is backbone), None)
    return {
        name
        for name, (module, mixin) in everything.items()
        if mixin in (AdaptedLinear, AdaptedConv1D)
        and module is not output
        and (name.startswith(within) if within is not None else name.rsplit(".", 1)[-1] not in _HEADS)
    }


def layer_of(name: str) -> str | None:
    """The repeated layer that a parameter of this name is in, a path's beginning up to the first number; or None."""
    found = _LAYER.match(name)
    return found[1] if found else None


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The submodule at the path, through children only: a file's text never reaches `getattr`."""
    found: nn.Module | None = model
    for part in path.split("."):
        found = None if found is None else found._modules.get(part)
    return found
