"""Coupled channels of a transformer block: orders that can be changed on both sides without changing the function.

An inner channel of a feed-forward block is a row of gate and up and a column of down; a group of attention heads that
share a key and a value is rows of q, k and v and columns of o. S²FT permutes those to have the trained ones in front.
It is the base that is reordered, before adapters are put on it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError


def reorder_channels(mlp: Any, order: Tensor) -> None:
    """Reorder the inner channels of a Llama-style feed-forward block in place: order (d_ff,), a permutation."""
    for layer in (mlp.gate_proj, mlp.up_proj):
        _reorder(layer, order, rows=True)
    _reorder(mlp.down_proj, order, rows=False)


def reorder_heads(attention: Any, order: Tensor) -> None:
    """Reorder the key-value groups of a Llama-style attention in place: order (key-value heads,), a permutation.

    Where several query heads share a key and a value they move together: any other order would mix them up.
    """
    kv = attention.k_proj.out_features // attention.head_dim
    if len(order) != kv:
        raise RankfoldError(f"an order of {len(order)} heads for an attention with {kv} keys and values")
    for layer, rows in (
        (attention.q_proj, True), (attention.k_proj, True), (attention.v_proj, True), (attention.o_proj, False)
    ):  # fmt: skip
        size = (layer.out_features if rows else layer.in_features) // kv  # of all heads with one key and value
        _reorder(layer, (order[:, None] * size + torch.arange(size, device=order.device)).flatten(), rows)


def front_first(chosen: Tensor, n: int) -> Tensor:
    """The permutation of n channels that puts the chosen ones in front and leaves the others in their order."""
    rest = torch.ones(n, dtype=torch.bool, device=chosen.device)
    rest[chosen.long()] = False
    return torch.cat([chosen.long(), rest.nonzero().flatten()])


@torch.no_grad()
def _reorder(layer: nn.Linear, order: Tensor, rows: bool) -> None:
    if order.sort().values.tolist() != list(range(layer.weight.shape[0 if rows else 1])):
        raise RankfoldError("the order is no permutation of the layer's channels")
    layer.weight.copy_(layer.weight.index_select(0 if rows else 1, order))
    if rows and layer.bias is not None:
        layer.bias.copy_(layer.bias[order])
