"""The one optimiser of the family that follows gradients in a subspace: projector × inner rule × residual rule."""

import functools
import random
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.optim._base import NotFinite, Rounding, Stepwise, precise
from rankfold.optim._eightbit import AdamW8bit
from rankfold.optim._projectors import Projector, Random
from rankfold.optim._rules import AdamW, Dropped, Inner, Residual

Switch = Literal["keep", "reset", "rotate"]


class Subspace(Stepwise):
    """Steps each matrix by what an inner rule makes of its gradient in a subspace, and a residual rule of the rest:

        R = down(G),  N, c = inner(R),  W ← W - lr · (c · scale · up(N) + residual(G - up(R)))

    `down` and `up` belong to the projector, whose basis is renewed from the gradient every `every` steps. Parameters
    that are no matrices, and groups with `"project": False` (embeddings, the head), are stepped by `fallback`.

    Args:
        params: parameters or groups, as torch.optim takes them.
        projector: Svd, RandomisedSvd, Random, Dct, Columns.
        inner: AdamW, Natural, SGD.
        residual: Dropped, NormScaled, Signed, Rescaled, Feedback.
        switch: what becomes of the moments when the basis changes: "keep" them as they are, "reset" them (and Adam's
            count of steps), or "rotate" them into the new basis (M ← M Rot, V ← |V Rot|, Rot = P_oldᵀ P_new).
        spread: give each matrix a step of its own for the renewal, so that no step has to do all of them; the first
            comes at `every` or up to as many steps later. Without it all are renewed at each multiple of `every`.
        decay: weight decay "before" the step (torch) or "after" it (the GaLore family).
        not_finite: a gradient with NaN or infinity raises, or skips the step and counts it in `skipped`.
        rounding: how 16-bit parameters are stepped (see `Stepwise`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        projector: Projector,
        inner: Inner = AdamW(),  # noqa: B008 (immutable)
        residual: Residual = Dropped(),  # noqa: B008
        fallback: Inner = AdamW(),  # noqa: B008
        scale: float = 1.0,
        every: int = 200,
        switch: Switch = "keep",
        spread: bool = True,
        decay: Literal["before", "after"] = "after",
        seed: int = 0,
        not_finite: NotFinite = "raise",
        rounding: Rounding = "nearest",
    ):
        if every < 1:
            raise RankfoldError(f"every: a basis is renewed after at least one step, not {every}")
        if switch == "rotate" and isinstance(projector, Random) and not projector.orthogonal:
            raise RankfoldError("switch: moments cannot be rotated between random bases that are not orthonormal")
        if switch != "keep" and isinstance(inner, AdamW8bit):
            raise RankfoldError(f"switch: moments in 8 bits are kept when the basis changes; {switch} needs 32")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "project": True}, not_finite, rounding)
        self.projector, self.inner, self.residual, self.fallback = projector, inner, residual, fallback
        self.scale, self.every, self.switch, self.spread = scale, every, switch, spread
        self.decay, self.seed = decay, seed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._number()

    def _number(self) -> None:
        own = [p for group in self.param_groups for p in group["params"] if self.projects(p, group)]
        self._places = {p: place for place, p in enumerate(own)}

    def place(self, p: Tensor) -> int:
        """The number of a matrix among those that are projected."""
        if p not in self._places:  # Accelerate puts others in the groups when it shards the model
            self._number()
        return self._places[p]

    def step_in_backward(self) -> None:
        """From now on step each parameter as soon as a backward pass has its gradient, and free the gradient.

        Then no more than one gradient is held, and `step()` finds nothing left to do. Every backward pass is a step:
        gradients cannot be accumulated over several, nor clipped by the norm of all.
        """
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(functools.partial(self._step_now, place))

    @torch.no_grad()
    def _step_now(self, place: int, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        if grad is None:
            return
        if bool(torch.isfinite(grad).all()):
            self.step_one(p, grad, self.param_groups[place])
        elif self.not_finite == "raise":
            raise RankfoldError(f"the gradient of a parameter {tuple(p.shape)} holds NaN or infinity")
        else:
            self.skipped += 1

    def projects(self, p: Tensor, group: dict[str, Any]) -> bool:
        return p.ndim == 2 and group["project"]

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype = precise(p)
        if not self.projects(p, group):
            return {"step": 0, **self.fallback.start(p, tuple(p.shape), dtype)}
        return {
            "step": 0,
            "t": 0,  # Adam's own count of steps
            **self.projector.start(p, dtype),
            **self.inner.start(p, self.projector.projected(p.shape), dtype),
            **self.residual.start(p, dtype),
        }

    def update(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        if kept != 1 and self.decay == "before":
            W.mul_(kept)
        if self.projects(p, group):
            self.change(p, W, G, state, lr)
        else:
            state["step"] += 1
            N, factor = self.fallback.direction(G, state, state["step"])
            W.add_(N, alpha=-lr * factor)
        if kept != 1 and self.decay == "after":
            W.mul_(kept)

    def change(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], lr: float) -> None:
        self.descend(p, W, G, state, lr)

    def descend(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], lr: float) -> None:
        """Take the step off W (out, in), which stands for p."""
        G = self.residual.gradient(G, state)
        if self._due(p, state["step"]):
            self._renew(p, G, state)
        state["step"] += 1
        state["t"] += 1
        frame = self.projector.frame(state, G)
        R = frame.down(G)
        N, factor = self.inner.direction(R, state, state["t"])
        rest = self.residual.step(G, R, N, frame, factor, self.scale, state)
        if rest is None:
            frame.add(W, N, -lr * factor * self.scale)
            return
        if not self.residual.alone:
            frame.add(rest, N, factor * self.scale)
        W.add_(rest, alpha=-lr)

    def _due(self, p: Tensor, step: int) -> bool:
        if step == 0 or not self.spread:
            return step % self.every == 0
        place, count = self.place(p), len(self._places)
        return step >= self.every and step % self.every == place * self.every // count

    def _renew(self, p: Tensor, G: Tensor, state: dict[str, Any]) -> None:
        first, old = state["step"] == 0, {}
        if self.switch == "rotate" and not first:
            old = {side: basis.clone() for side, basis in self.projector.kept(state).items()}
        seed = random.Random(f"{self.seed}/{self.place(p)}/{state['step']}").getrandbits(63)
        self.projector.refresh(G, state, seed)
        if first:
            return
        self.inner.forget(state)
        if self.switch == "reset":
            state["t"] = 0
        for name in self.inner.moments:
            if name in state and self.switch == "reset":
                state[name].zero_()
            elif name in state and self.switch == "rotate":
                state[name].copy_(_rotated(state[name], old, self.projector.kept(state), positive=name == "v"))


def _rotated(M: Tensor, old: dict[str, Tensor], new: dict[str, Tensor], positive: bool) -> Tensor:
    for side, basis in old.items():
        if basis.is_floating_point():
            rotation = basis.mT @ new[side]
        else:  # places of axes: those that stay move to their new slot, the others are dropped
            rotation = (basis.unsqueeze(1) == new[side].unsqueeze(0)).to(M.dtype)
        M = rotation.mT @ M if side == "left" else M @ rotation
    return M.abs() if positive else M
