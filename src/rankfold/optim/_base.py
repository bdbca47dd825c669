"""What the optimisers here share: finite gradients only, state counted before it exists, exact resumption."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

NotFinite = Literal["raise", "skip"]


class Stepwise(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps one parameter after the other. A subclass says two things:

    - `start(p, group)`: the state of a parameter before its first step, a dict of tensors and plain numbers, on p's
      device, computed from shapes only;
    - `update(p, G, state, group)`: one step of p from its gradient G (float32, or float64 for a float64 p).

    A step whose gradients hold NaN or infinity changes nothing: it raises RankfoldError, or is counted in `skipped`.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], not_finite: NotFinite = "raise"):
        if defaults["lr"] < 0 or defaults["weight_decay"] < 0:
            raise RankfoldError(f"lr and weight_decay are at least 0: {defaults['lr']}, {defaults['weight_decay']}")
        super().__init__(params, defaults)
        self.not_finite = not_finite
        self.skipped = 0

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def update(self, p: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._finite():
            self.skipped += 1
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_one(p, p.grad, group)
        return loss

    def step_one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p not in self.state:
            self.state[p] = self.start(p, group)
        self.update(p, grad.to(precise(p)), self.state[p], group)

    def state_bytes(self) -> int:
        """Bytes of state for all parameters, stepped yet or not."""
        states = [self.start(p.detach().to("meta"), group) for group in self.param_groups for p in group["params"]]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast every tensor to the parameter's type: float32 moments, indices, codes."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                state = cast(Mapping[str, Any], state_dict["state"][i])
                self.state[p] = {
                    name: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }

    def _finite(self) -> bool:
        names = [
            (f"{g}.{i}", p.grad)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        if not names:
            return True
        # A sum is finite only if every term is, and much cheaper; one that overflows is looked at again.
        if bool(torch.stack([grad.sum().to(names[0][1].device) for _, grad in names]).isfinite().all()):
            return True
        finite = torch.stack([torch.isfinite(grad).all().to(names[0][1].device) for _, grad in names])
        if bool(finite.all()):
            return True
        if self.not_finite == "raise":
            first = next(name for (name, _), good in zip(names, finite.tolist(), strict=True) if not good)
            raise RankfoldError(f"the gradient of parameter {first} (group.place) holds NaN or infinity")
        return False


def precise(p: Tensor) -> torch.dtype:
    """The type that p is stepped in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
