"""Which base model an adapter was trained on, in a form that survives another dtype, quantisation and sharding.

A hash of the weights would change with every rounding. So the fingerprint keeps what a reader wants to know (class,
name, size) and a sample of the adapted weights themselves, which tells by how much a base differs.
"""

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.delta import Site
from rankfold.core.layers import as_matrix
from rankfold.core.quantized import dense, is_plain
from rankfold.core.targets import inside_adapter

SITES = 8
VALUES = 16
# The samples of quantised weights by layer, since dequantising is slow: {parameter: (weight, its version, values)}.
_Kept = dict[str, tuple[weakref.ref[Tensor], int, list[float]]]
_dequantised: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module, sites: Sequence[Site], originals: Mapping[str, Tensor]) -> dict[str, Any]:
    """The base's class, name, number of parameters and, for up to 8 adapted sites, 16 values of the weight each.

    `originals` holds the weights, by `path.parameter`, that stood where merged ones stand now.
    """
    step = max(1.0, len(sites) / SITES)
    chosen = [sites[int(i * step)] for i in range(min(SITES, len(sites)))]
    sampled = {site.name: sample(site, originals) for site in chosen}
    rounded = {
        name: [float(f"{value:.6g}") for value in values] for name, values in sampled.items() if values is not None
    }
    return {**about(model), "sample": rounded}


def about(model: Any) -> dict[str, Any]:
    """The model's class, name and number of parameters, without its adapters'."""
    cls = getattr(model, "_plain", type(model))  # an adapted layer's own class, if the model is a single layer
    name = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if Path(name).is_absolute() or Path(name).is_dir():
        name = Path(name).name  # where the model lay on the disk of whoever saved the adapter is nobody's business
    count = sum(parameter.numel() for path, parameter in model.named_parameters() if not inside_adapter(path))
    return {"class": cls.__name__, "name_or_path": name[:200], "parameters": count}


def sample(site: Site, originals: Mapping[str, Tensor]) -> list[float] | None:
    """Values of the site's dense weight W (out, in) at evenly spaced places; None if it is not in memory."""
    at = site.name if site.kind == "experts" else f"{site.name}.{site.parameter}"
    weight = originals.get(at, site.stored)
    if weight.is_meta:
        return None
    if is_plain(weight):
        return values(as_matrix(site, weight))
    kept = _dequantised.setdefault(site.layer, {})
    before = kept.get(site.parameter)
    if before is None or before[0]() is not weight or before[1] != weight._version:
        before = kept[site.parameter] = (
            weakref.ref(weight),
            weight._version,
            values(as_matrix(site, dense(weight, site.layer))),
        )
    return before[2]


@torch.no_grad()
def values(W: Tensor) -> list[float]:
    """Values of a dense W (..., out, in) at evenly spaced places."""
    return W[_places(tuple(W.shape))].nan_to_num().tolist()


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices of evenly spaced entries in row order; picking by index copies nothing of a transposed weight."""
    size = math.prod(shape)
    flat = torch.tensor([i * (size - 1) // (VALUES - 1) for i in range(VALUES)] if size > VALUES else range(size))
    return torch.unravel_index(flat, shape)


def difference(theirs: Mapping[str, Sequence[float]], ours: Mapping[str, Sequence[float]]) -> float:
    """How far two samples are apart: 0 for equal weights, about 1.4 for independent ones, at most 2.

    The root mean square, over the sites, of the distance relative to the larger of the two norms.
    """
    squares = []
    for name, values in theirs.items():
        if name in ours and len(ours[name]) == len(values):
            largest = max(math.hypot(*values), math.hypot(*ours[name]))
            squares.append((math.dist(values, ours[name]) / largest) ** 2 if largest else 0.0)
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0
