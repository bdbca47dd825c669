"""A small language model tuned to other text and kept in few bits: rounded before the tuning, after it, or both.

A side says so in `merge`: `bits`, the `group` that has a scale, and whether the model is rounded `before` the tuning or
`after` it, when what is tuned has been merged into float weights.
"""

import time
from typing import Any

import torch
from torch import nn

import rankfold
from claims.harness import Measure, Run, Side, build, fit, outcome
from claims.tasks import Loaded
from rankfold.core.packed import PackedLinear

ADDED = "loss that packing adds"


def side(method: dict[str, Any], lr: float | tuple[float, ...], *when: str, bits: int = 3, steps: int = 60) -> Side:
    """Tuned by the method, with a scale for each output, as in PEQA; `when` are "before" and "after"."""
    return Side(method, lr=lr, steps=steps, merge={"bits": bits, "group": "channel", "when": list(when)})


def tuned(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Tune as the side says. The held-out loss is that of the packed model which comes of it."""
    assert side.method is not None
    assert side.merge is not None
    loaded.in_full, started = (), time.perf_counter()
    torch.manual_seed(seed)
    loaded.fresh(seed)
    model = loaded.model
    scheme = rankfold.Scheme(format=f"int{side.merge['bits']}", group=side.merge["group"])  # type: ignore[arg-type]
    if "before" in side.merge["when"]:
        rankfold.quantize(model, scheme)
    adapter = rankfold.attach(model, build(side.method), seed=seed)
    found = outcome(loaded, adapter, seed, fit(loaded, adapter, side, loaded.batches(seed)), started)
    if "after" in side.merge["when"]:
        _as_floats(model, adapter)
        rankfold.quantize(model, scheme)
    else:
        rankfold.merge(model)
        assert all(isinstance(model.get_submodule(site), PackedLinear) for site in adapter.deltas)
    packed = float(f"{loaded.evaluate()['held-out loss']:.6g}")
    found |= {"held-out loss": packed, ADDED: packed - found["held-out loss"]}
    return found if measure is None else found | dict(measure(Run(loaded, adapter, seed, [], found)))


@torch.no_grad()
def _as_floats(model: nn.Module, adapter: rankfold.Adapter) -> None:
    """Put linear layers in place of the adapted ones, packed or not, with what these compute in their float weights."""
    weights = {site: delta.adapted_weight(delta.W) for site, delta in adapter.deltas.items()}
    rankfold.detach(model)
    for site, W in weights.items():
        parent, _, name = site.rpartition(".")
        layer: Any = model.get_submodule(site)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight.copy_(W)
        model.get_submodule(parent)._modules[name] = plain
