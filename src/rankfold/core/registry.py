"""The registry as users see it: every component, and for methods what each can do."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rankfold.core.component import components
from rankfold.core.delta import Site
from rankfold.core.method import BASES, OTHER_BASES, Method
from rankfold.core.packed import PackedLinear, Scheme

KINDS = ("linear", "conv1d", "embedding", "conv", "experts", "norm")


@dataclass(frozen=True)
class Entry:
    """One registered component. `hyperparameters` are the defaults, "required" for what has none; `supports` is filled
    for methods: capability → True, or the reason why not."""

    slug: str
    axis: str
    title: str
    source: str
    hyperparameters: dict[str, Any]
    supports: dict[str, bool | str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def methods() -> list[Entry]:
    """Every registered component of every axis, by axis and slug."""
    entries = []
    for cls in components():
        fields = cls.model_fields.items()
        hyperparameters = {name: "required" if info.is_required() else info.default for name, info in fields}
        supports = _supports(cls()) if issubclass(cls, Method) else {}
        entries.append(Entry(cls.slug, cls.axis, cls.title, cls.source, hyperparameters, supports))
    return entries


def example_site(kind: str, base: str = "float") -> Site:
    """A small site of a kind, with shapes only; over a packed base a linear one, with an empty layer."""
    shape = {"experts": (4, 64, 64), "norm": (64, 0), "conv": (64, 64 * 9)}.get(kind, (64, 64))
    site = Site("example", kind, shape, kind in ("linear", "conv1d", "conv", "norm"), torch.float32)
    if base == "packed" and kind == "linear":
        site.layer = PackedLinear(64, 64, Scheme(), True, torch.float32, None)
    return site


def _supports(method: Method) -> dict[str, bool | str]:
    base = method.over[0]
    supports: dict[str, bool | str] = {kind: method.refusal(example_site(kind, base)) or True for kind in KINDS}
    supports |= {f"{base}-base": base in method.over or OTHER_BASES[method.over] for base in BASES}
    site = example_site("linear", base)
    delta = method.delta(site, method.shared([site], 0))
    function = "its change is a function of the output, not a ΔW"
    if delta.form == "function":
        supports["experts"] = function
    biases = "it changes biases only"
    supports["merge"] = function if delta.form == "function" else True
    supports["as-lora"] = {"function": function, "bias": biases}.get(delta.form, True)
    supports["inits"] = True if delta.startable else "it has no two factors of its own that an init could set"
    supports["rank-plan"] = True if delta.by_component else "it is no product of two factors with components of its own"
    supports["identity"] = method.departs or True
    return supports
