"""What the optimisers here share: finite gradients only, 16-bit parameters, state counted before it exists, exact
resumption."""

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from rankfold.errors import RankfoldError

NotFinite = Literal["raise", "skip"]
Rounding = Literal["nearest", "stochastic", "masters"]


class Stepwise(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that steps one parameter after the other. A subclass says two things:

    - `start(p, group)`: the state of a parameter before its first step, a dict of tensors and plain numbers, on p's
      device, computed from shapes only;
    - `update(p, W, G, state, group)`: one step of W, the numbers of p, in place, from the gradient G (float32, or
      float64 for a float64 p).

    A step whose gradients hold NaN or infinity changes nothing: it raises RankfoldError, or is counted in `skipped`.

    A step that is less than half a unit in a 16-bit parameter's last place is lost when the result goes to the
    "nearest" number. With rounding="stochastic" a float32 result goes to one of its two neighbours, the nearer the
    likelier, so that it is right on average, and nothing more is kept. With "masters" a float32 copy of p is kept and
    stepped, 4 bytes a number, and p is that copy rounded; what something else writes into p goes into the copy.

    A parameter that FSDP has sharded is put together for its step, as its gradient is, one at a time; every process
    makes the whole step, keeps the whole state, and writes its own part.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        not_finite: NotFinite = "raise",
        rounding: Rounding = "nearest",
    ):
        if defaults["lr"] < 0 or defaults["weight_decay"] < 0:
            raise RankfoldError(f"lr and weight_decay are at least 0: {defaults['lr']}, {defaults['weight_decay']}")
        super().__init__(params, defaults)
        self.not_finite, self.rounding = not_finite, rounding
        self.skipped = 0

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def update(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
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
            P = whole(p)
            self.state[p] = self._mastered(P, self.start(P, group))
        W = self.numbers(p)
        self.update(p, W, whole(grad).to(precise(p)), self.state[p], group)
        self.write(p, W)

    def numbers(self, p: Tensor) -> Tensor:
        """What is stepped for p, and then given to `write`: p itself, unless sharded or rounded in its own way."""
        P = whole(p)
        if self.rounding == "nearest" or p.dtype == precise(p):
            return P
        if "master" not in self.state.get(p, {}):
            return P.detach().to(precise(p))
        master = self.state[p]["master"]
        return master.copy_(torch.where(master.to(p.dtype) == P, master, P.to(master.dtype)))

    def write(self, p: Tensor, W: Tensor) -> None:
        """Round the `numbers` into p."""
        if W is p:
            return
        if self.rounding == "stochastic":
            first = self.param_groups[0]  # what a group holds is kept in a checkpoint
            first["roundings"] = first.get("roundings", 0) + 1
            seed = random.Random(f"rounding/{first['roundings']}").getrandbits(63)
            W = stochastic(W, p.dtype, torch.Generator(W.device).manual_seed(seed))
        own(p).copy_(share(W, p))

    def _mastered(self, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        if self.rounding == "masters" and p.dtype != precise(p):
            state.setdefault("master", p.detach().to(precise(p)))
        return state

    def state_bytes(self) -> int:
        """Bytes of state for all parameters, stepped yet or not."""
        blank = [
            (torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
            for group in self.param_groups
            for p in group["params"]
        ]
        states = [self._mastered(p, self.start(p, group)) for p, group in blank]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast every tensor to the parameter's type: float32 moments, indices, codes."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                state = cast(Mapping[str, Any], state_dict["state"][i])
                own_state = {
                    name: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
                self.state[p] = self._mastered(p, own_state)

    def _finite(self) -> bool:
        grads = {
            f"{g}.{i}": p.grad
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        }
        if not grads:
            return True
        parts, sharded = [own(grad) for grad in grads.values()], any(isinstance(g, DTensor) for g in grads.values())
        device = parts[0].device
        # A sum is finite only if every term is, and much cheaper; one that overflows is looked at again.
        finite = torch.stack([part.sum().to(device) for part in parts]).isfinite()
        if bool(_everywhere(finite, sharded).all()):
            return True
        finite = _everywhere(torch.stack([torch.isfinite(part).all().to(device) for part in parts]), sharded)
        if bool(finite.all()):
            return True
        if self.not_finite == "raise":
            first = next(name for name, good in zip(grads, finite.tolist(), strict=True) if not good)
            raise RankfoldError(f"the gradient of parameter {first} (group.place) holds NaN or infinity")
        return False


def whole(x: Tensor) -> Tensor:
    """All numbers of a tensor; it itself, unless it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own(x: Tensor) -> Tensor:
    """The numbers of a tensor that this process has; it itself, unless it is sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def share(x: Tensor, p: Tensor) -> Tensor:
    """Of x, which every process has as a whole, the numbers that this process has of p."""
    if not isinstance(p, DTensor):
        return x
    everywhere = [Replicate()] * p.device_mesh.ndim
    replicated = DTensor.from_local(x, p.device_mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def _everywhere(flags: Tensor, sharded: bool) -> Tensor:
    """What is true in every process, where each sees its own shards."""
    if not sharded:
        return flags
    counts = flags.int()
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MIN)
    return counts.bool()


def precise(p: Tensor) -> torch.dtype:
    """The type that p is stepped in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def stochastic(W: Tensor, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """W (float32) rounded up or down to 16 bits with the probabilities that make its mean W. Draws from rng.

    Random bits are added below the last bit that dtype keeps, and what is then below it is cut off.
    """
    info = torch.finfo(dtype)
    step = round(info.eps / torch.finfo(torch.float32).eps)  # of the bits, between neighbours in dtype
    shift = torch.finfo(torch.float32).tiny / info.tiny  # so that numbers lose their bits where they do in dtype
    bits = (W * shift).view(torch.int32)
    bits += torch.randint(step, W.shape, generator=rng, dtype=torch.int32, device=W.device)
    bits &= -step
    return (bits.view(torch.float32) / shift).to(dtype)
