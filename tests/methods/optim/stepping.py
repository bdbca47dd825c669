"""Steps with given gradients: what the tests of optimisers share."""

from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from tests.methods.support import DOUBLE, draw

TALL = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=DOUBLE)


def made(component: rankfold.Optimizer, *params: Tensor, lr: float = 1.0, decay: float = 0.0, **group: Any) -> Any:
    """The optimiser of these parameters."""
    return component.optimizer([{"params": list(params), **group}], lr, decay)


def moved(optimizer: Any, p: Tensor, G: Tensor) -> Tensor:
    """What one step with gradient G adds to p."""
    before = p.detach().clone()
    p.grad = G.clone()
    optimizer.step()
    return p.detach() - before


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Parameter:
    return nn.Parameter(draw(*shape, seed=seed, dtype=dtype))


def resumed_bit_for_bit(component: rankfold.Optimizer, tmp_path: Any, dtype: torch.dtype = torch.float32) -> None:
    """Five steps, a state through a file, five more: the same as ten, for a matrix of each shape and a vector."""
    shapes = [(6, 4), (4, 6), (5,)]

    def fresh() -> tuple[list[nn.Parameter], Any]:
        params = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
        return params, made(component, *params, lr=0.01, decay=0.1)

    def walk(params: list[nn.Parameter], optimizer: Any, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(params):
                p.grad = draw(*p.shape, seed=100 * step + i, dtype=dtype)
            optimizer.step()

    params, optimizer = fresh()
    walk(params, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weights = [p.detach().clone() for p in params]
    walk(params, optimizer, range(5, 10))
    others, again = fresh()
    for p, weight in zip(others, weights, strict=True):
        p.data.copy_(weight)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    walk(others, again, range(5, 10))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        state, other = optimizer.state[p], again.state[q]
        assert state.keys() == other.keys()
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert value.dtype == other[name].dtype
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    assert held == optimizer.state_bytes()
