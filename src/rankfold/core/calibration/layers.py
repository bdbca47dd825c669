"""Batches and layers: which tokens count, a layer's input as a matrix, its weight's gradient."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.core.delta import Site
from rankfold.core.targets import Target


def forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, device) for value in batch]
    return batch.detach().to(device) if isinstance(batch, Tensor) else batch


def masks(batch: Any) -> dict[tuple[int, ...], Tensor]:
    """Which tokens count, by the shape (batch, length) of the inputs they are about.

    An encoder's mask and a decoder's labels of the same length cannot be told apart: what either leaves out is left
    out of both, so that no padding gets in.
    """
    found: dict[tuple[int, ...], Tensor] = {}
    for key in ("attention_mask", "decoder_attention_mask", "labels") if isinstance(batch, Mapping) else ():
        given = batch.get(key)
        if isinstance(given, Tensor) and given.dim() == 2:
            mask = given != -100 if key == "labels" else given != 0
            found[tuple(mask.shape)] = found[tuple(mask.shape)] & mask if tuple(mask.shape) in found else mask
    return found


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def tokens(target: Target, x: Tensor, masks: dict[tuple[int, ...], Tensor]) -> tuple[Tensor, list[int]]:
    """The site's inputs as X (tokens, in) in its dtype, without those that are masked, and how many each sample has."""
    site = target.site
    if site.kind == "conv":
        pictures = _patches(target.layer, x.to(site.dtype)).transpose(-1, -2)
        X = pictures.reshape(-1, site.in_)
        return X, [len(X) // len(pictures)] * len(pictures)
    ids = site.kind == "embedding"
    lead = tuple(x.shape) if ids else tuple(x.shape[:-1])
    x = x.reshape(-1) if ids else x.reshape(-1, site.in_)
    # A mixture of experts flattens (batch, length) before its layers.
    mask = next((m for shape, m in masks.items() if lead in (shape, (m.numel(),))), None)
    if mask is not None:
        x, lengths = x[mask.reshape(-1).to(x.device)], mask.sum(1).tolist()
    else:
        lengths = [len(x) // lead[0]] * lead[0] if len(lead) > 1 and lead[0] else [len(x)]
    return _one_hot(x, site) if ids else x.to(site.dtype), lengths


def _one_hot(ids: Tensor, site: Site) -> Tensor:
    at = torch.stack([torch.arange(len(ids), device=ids.device), ids])
    ones = torch.ones(len(ids), dtype=site.dtype, device=ids.device)
    return torch.sparse_coo_tensor(at, ones, (len(ids), site.in_), check_invariants=True)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What each position of a convolution sees: (batch, groups, channels / groups · kernel, positions).

    The groups share the columns of W, each using its own rows, so each one's patch counts as an input.
    """
    kernel = tuple(layer.weight.shape[2:])
    if x.dim() == layer.weight.dim() - 1:
        x = x.unsqueeze(0)
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    dilation, stride = layer.dilation, layer.stride
    if len(kernel) == 1:  # as an image of height 1
        x, kernel, dilation, stride = x.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = F.unfold(x, kernel, dilation, 0, stride)
    return patches.reshape(patches.shape[0], layer.groups, -1, patches.shape[-1])


@torch.no_grad()
def weight_gradient(target: Target, x: Tensor, g: Tensor) -> Tensor:
    """∂loss/∂W (out, in) from the layer's input x and its output's gradient g, in the site's dtype."""
    site = target.site
    layer: Any = target.layer
    g = g.to(site.dtype)
    if site.kind == "embedding":
        G = g.new_zeros(site.in_, site.out).index_add_(0, x.reshape(-1), g.reshape(-1, site.out))
        if layer.padding_idx is not None:
            G[layer.padding_idx] = 0
        return G.mT * getattr(layer, "embed_scale", 1.0)
    if site.kind == "conv":
        X = _patches(layer, x.to(site.dtype))
        g = g.reshape(X.shape[0], layer.groups, site.out // layer.groups, X.shape[-1])
        return torch.einsum("bgop,bgip->goi", g, X).reshape(site.out, site.in_)
    return g.reshape(-1, site.out).mT @ x.reshape(-1, site.in_).to(site.dtype)
