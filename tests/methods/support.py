"""One layer, one delta: what the tests of single methods share."""

from typing import Any

import torch
from torch import Tensor, nn

import rankfold

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def linear(W: Any, b: Any = None) -> nn.Linear:
    """A linear layer with these numbers."""
    W = torch.as_tensor(W, dtype=DOUBLE)
    layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(W)
        if b is not None:
            layer.bias.copy_(torch.as_tensor(b, dtype=DOUBLE))
    return layer


def attached(layer: nn.Module, method: rankfold.Method, **options: Any) -> tuple[nn.Sequential, Any]:
    """A model of the one layer with the method on it, and its delta."""
    model = nn.Sequential(layer)
    adapter = rankfold.attach(model, method, targets=["0"], **options)
    return model, next(iter(adapter.deltas.values()))


def put(delta: Any, **values: Any) -> None:
    """Set tensors of the delta."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(delta, name).copy_(torch.as_tensor(value, dtype=DOUBLE))


def perturb(delta: Any, seed: int = 1, size: float = 0.3) -> None:
    """Move every trained number off its start."""
    with torch.no_grad():
        for i, parameter in enumerate(delta.parameters()):
            parameter.add_(size * draw(*parameter.shape, seed=seed + i, dtype=parameter.dtype))


def change(delta: Any) -> Tensor:
    """ΔW (out, in), detached."""
    W = delta.W.detach().to(DOUBLE)
    return delta.adapted_weight(W).detach() - W


def close(a: Tensor, b: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a.detach().to(DOUBLE), torch.as_tensor(b, dtype=DOUBLE), atol=atol, rtol=0)
