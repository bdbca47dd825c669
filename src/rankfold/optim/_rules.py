"""Inner rules: what a projected gradient R becomes; residual rules: what is done with the gradient outside."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankfold.optim._projectors import Frame

TINY = 1e-8


# ---- inner rules


@dataclass(frozen=True)
class SGD:
    """N = R, or with momentum μ: m ← μ m + R, N = m."""

    momentum: float = 0.0
    moments: ClassVar[tuple[str, ...]] = ("m",)

    def start(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        return {"m": p.new_zeros(shape, dtype=dtype)} if self.momentum else {}

    def direction(self, R: Tensor, state: dict[str, Any], t: int) -> tuple[Tensor, float]:
        if not self.momentum:
            return R, 1.0
        return state["m"].mul_(self.momentum).add_(R).clone(), 1.0

    def forget(self, state: dict[str, Any]) -> None:
        """What is left of the state when the subspace changes, whatever becomes of the moments."""


@dataclass(frozen=True)
class AdamW:
    """N = m / (√v + eps), and the factor `√(1-β2ᵗ)/(1-β1ᵗ)` that the step gets besides.

    So does the optimiser of the GaLore family, with eps = 1e-6. `corrected` is torch's Adam, where eps is added after
    v is corrected: eps times √(1-β2ᵗ), in the same words.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    corrected: bool = False
    moments: ClassVar[tuple[str, ...]] = ("m", "v")

    def start(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        return {"m": p.new_zeros(shape, dtype=dtype), "v": p.new_zeros(shape, dtype=dtype)}

    def direction(self, R: Tensor, state: dict[str, Any], t: int) -> tuple[Tensor, float]:
        beta1, beta2 = self.betas
        root, first = math.sqrt(1 - beta2**t), 1 - beta1**t
        # torch's fused step, one pass over memory: it takes lr · N · root/first off a matrix, here off 0. It takes the
        # numbers as they lie in memory, so that R has to lie as the moments do.
        R = R.contiguous()
        N, steps = torch.zeros_like(R), [torch.tensor(float(t), device=R.device)]
        eps = self.eps if self.corrected else self.eps / root
        torch._fused_adam_(
            [N], [R], [state["m"]], [state["v"]], [], steps, lr=-first / root, beta1=beta1, beta2=beta2,
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return N, root / first

    def forget(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Natural(AdamW):
    """Adam on g̃ = (λI + H Hᵀ)⁻¹ g, with g = vec(R) and H the last `history` of them, g itself the last column.

    Since g = H e, also g̃ = H (λI + HᵀH)⁻¹ e: the same without the difference of large numbers in Woodbury's form.
    The history is dropped when the subspace changes, since it is told in the old one's coordinates.
    """

    damping: float = 1e-3
    history: int = 20

    def start(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        H = p.new_zeros(self.history, math.prod(shape), dtype=dtype)
        return {**super().start(p, shape, dtype), "H": H, "seen": 0}

    def direction(self, R: Tensor, state: dict[str, Any], t: int) -> tuple[Tensor, float]:
        return super().direction(self.natural(R, state), state, t)

    def natural(self, R: Tensor, state: dict[str, Any]) -> Tensor:
        place = state["seen"] % self.history
        state["H"][place] = R.flatten()
        state["seen"] += 1
        H = state["H"][: min(state["seen"], self.history)]
        values, U = torch.linalg.eigh((H @ H.mT).double())
        y = U @ (U[place] / (values.clamp(min=0) + self.damping))
        return (H.mT @ y.to(H.dtype)).view_as(R)

    def forget(self, state: dict[str, Any]) -> None:
        state["seen"] = 0


# ---- residual rules


@dataclass(frozen=True)
class Dropped:
    """Nothing is done with it: the step stays in the subspace."""

    alone: ClassVar[bool] = False  # the residual rule makes the whole step

    def start(self, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return {}

    def gradient(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        """What is projected."""
        return G

    def step(
        self, G: Tensor, R: Tensor, N: Tensor, frame: Frame, factor: float, scale: float, state: dict[str, Any]
    ) -> Tensor | None:
        """What the step gets besides `factor · scale · up(N)`."""
        return None


@dataclass(frozen=True)
class Feedback(Dropped):
    """It is kept, and added to the next gradient: A = G + E, E ← A - up(down(A))."""

    def start(self, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return {"E": p.new_zeros(p.shape, dtype=dtype)}

    def gradient(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        return G + state["E"]

    def step(
        self, G: Tensor, R: Tensor, N: Tensor, frame: Frame, factor: float, scale: float, state: dict[str, Any]
    ) -> Tensor | None:
        state["E"].copy_(frame.outside(G, R))
        return None


@dataclass(frozen=True)
class Signed(Dropped):
    """Sign descent: `scale · ratio · sign(G - up(R))`."""

    ratio: float = 1.0

    def step(
        self, G: Tensor, R: Tensor, N: Tensor, frame: Frame, factor: float, scale: float, state: dict[str, Any]
    ) -> Tensor | None:
        return frame.outside(G, R).sign_().mul_(scale * self.ratio)


@dataclass(frozen=True)
class NormScaled(Dropped):
    """Gradient descent scaled as the inner rule scaled R: S = φ ⊙ (G - α up(R)), φ = ‖N‖/‖R‖ a row or column.

    α is the optimiser's `scale` (`removes="authors"`) or 1 (`removes="paper"`). The norm of S may grow by the factor
    `limit` a step; a step without any residual sets no limit for the next.
    """

    limit: float = 1.01
    removes: Literal["authors", "paper"] = "authors"

    def start(self, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        return {"norm": p.new_zeros((), dtype=dtype)}

    def step(
        self, G: Tensor, R: Tensor, N: Tensor, frame: Frame, factor: float, scale: float, state: dict[str, Any]
    ) -> Tensor | None:
        S = frame.outside(G, R, scale if self.removes == "authors" else 1.0).mul_(ratios(N, R, frame.along))
        return S.mul_(factor / cut(S, state["norm"], self.limit))


@dataclass(frozen=True)
class Rescaled(NormScaled):
    """The whole gradient scaled so, and nothing else: √scale · φ ⊙ G. φ a row or column, or one (`tensor`)."""

    tensor: bool = False
    alone: ClassVar[bool] = True

    def step(
        self, G: Tensor, R: Tensor, N: Tensor, frame: Frame, factor: float, scale: float, state: dict[str, Any]
    ) -> Tensor | None:
        S = ratios(N, R, None if self.tensor else frame.along) * G
        return S.mul_(factor * math.sqrt(scale) / cut(S, state["norm"], self.limit))


def ratios(N: Tensor, R: Tensor, along: int | None) -> Tensor:
    """‖N‖ / ‖R‖, norms taken along that dimension, or of the whole matrix."""
    dims = (0, 1) if along is None else along
    return N.norm(dim=dims, keepdim=True) / (R.norm(dim=dims, keepdim=True) + TINY)


def cut(S: Tensor, last: Tensor, limit: float) -> Tensor:
    """What S is to be divided by: its norm over `limit` times the last step's norm, or 1 if that is more.

    `last` holds the norm that the last step had once it was cut, and is told this one's.
    """
    norm = S.norm()
    by = torch.where(last > 0, (norm / (last + TINY)).clamp(min=limit) / limit, 1.0)
    last.copy_(norm / by)
    return by


Inner = SGD | AdamW
Residual = Dropped
