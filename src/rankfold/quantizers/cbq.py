"""CBQ: Cross-Block Quantization for Large Language Models. Ding et al. 2023, arXiv 2312.07950."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core.activations import rounded
from rankfold.core.calibration import InputMagnitude, Statistic
from rankfold.core.calibration.blocks import Window, standing
from rankfold.core.packed import Packed, Scheme, grouped, pack, rows_of, spread
from rankfold.errors import UnsupportedError
from rankfold.quantizers._quantizer import Quantizer, weight
from rankfold.quantizers.rtn import ranges

ZETA, GAMMA = 1.1, -0.1


class CBQ(Quantizer):
    """Which way each weight is rounded, and the step sizes, are learnt in windows of K blocks that share `overlap`.

        Ŵ = s clamp(⌊W/s⌋ + Δ, q_min, q_max),  Δ = clip(sigmoid(V) (ζ − γ) + γ, 0, 1),  V = V₀ + A₁ A₂ of rank r
        L = ‖h − ĥ‖² + KL(softmax h ‖ softmax ĥ) + λ mean(1 − |2Δ − 1|^β),  β from 20 to 2

    with h what the window gives for a token in the float model and ĥ what it gives now; ζ = 1.1, γ = −0.1. V₀ is
    AdaRound's, from the fraction of W/s, so that all begins at round to nearest; A₁ is drawn, A₂ = 0. In the forward
    pass Δ is what it will be in the end, [V ≥ 0], and its gradient that of the formula: the paper's soft Δ would have
    to become 0 or 1 by the penalty, which a V of low rank cannot do for every weight, and is then hardened at a loss.
    Steps are trained as shares of themselves; those of activations are each token's own, where the scheme rounds them.

    Before, outliers are taken out: weights above a `boundary` are cut to it, and input channels above theirs, T, are
    divided by t = √(max|X| / T), their columns multiplied. Rates, λ and the order of the data are ours.
    """

    slug: ClassVar[str] = "cbq"
    title: ClassVar[str] = "CBQ: Cross-Block Quantization for Large Language Models"
    source: ClassVar[str] = "arXiv 2312.07950"

    blocks: Annotated[int, Field(ge=1, description="K")] = 2
    overlap: Annotated[int, Field(ge=0, description="blocks that are in the next window again")] = 1
    rank: Annotated[int, Field(ge=1, description="r")] = 5
    epochs: Annotated[int, Field(ge=1, description="of each window")] = 3
    lr: Annotated[float, Field(gt=0, description="of A₁ and A₂")] = 1e-2
    step_lr: Annotated[float, Field(gt=0, description="of the steps")] = 1e-3
    penalty: Annotated[float, Field(ge=0, description="λ")] = 0.01
    seed: int = 0

    def needs(self) -> tuple[Statistic[Any], ...]:
        return (InputMagnitude(),)

    @property
    def span(self) -> tuple[int, int]:
        return self.blocks, min(self.overlap, self.blocks - 1)

    def pack(self, window: Window, scheme: Scheme) -> Iterator[tuple[str, Packed, Scheme]]:
        if scheme.table is not None:
            raise UnsupportedError(
                f"cbq chooses between two whole numbers, which {scheme.format} has not: int or ternary"
            )
        assert window.statistics is not None  # quantize collects what `needs` names
        layers: dict[str, Rounding] = {}
        for path, layer in window.layers.items():
            before = {
                name: window.carried[key] for name in Rounding.LEARNT if (key := f"{path}/{name}") in window.carried
            }
            sizes = window.statistics.get(InputMagnitude(), path).largest
            layers[path] = Rounding(weight(layer), sizes, scheme, self.rank, self.seed, before)
        self.learn(window, layers)
        later = [path for path in layers if path not in window.due]
        window.carried = {f"{p}/{name}": getattr(layers[p], name).detach() for p in later for name in Rounding.LEARNT}
        for path in window.due:
            yield path, layers[path].packed(), layers[path].scheme

    def learn(self, window: Window, layers: Mapping[str, "Rounding"]) -> None:
        with window.at_rest():
            exact = [window.run(call, call.exact) for call in window.calls]
        factors = [factor for one in layers.values() for factor in (one.A1, one.A2)]
        steps = [one.share for one in layers.values()]
        optimizer = torch.optim.Adam([{"params": factors, "lr": self.lr}, {"params": steps, "lr": self.step_lr}])
        rng, n = torch.Generator().manual_seed(self.seed), len(exact)
        order = [i for _ in range(self.epochs) for i in torch.randperm(n, generator=rng).tolist()]
        with window.at_rest(), torch.enable_grad(), contextlib.ExitStack() as hooks:
            for path, one in layers.items():
                seen = window.layers[path].register_forward_pre_hook(lambda _, args, one=one: (one.inputs(args[0]),))
                hooks.callback(seen.remove)
            for step, i in enumerate(order):
                deltas = {path: one.delta() for path, one in layers.items()}
                with standing({window.layers[path]: one.value(deltas[path]) for path, one in layers.items()}):
                    y = window.run(window.calls[i])
                loss = (y - exact[i]).square().sum(-1).mean() + divergence(exact[i], y)
                beta = 20 - 18 * step / max(len(order) - 1, 1)
                loss = loss + self.penalty * torch.cat([undecided(d, beta).flatten() for d in deltas.values()]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


class Rounding:
    """A layer's W (out, in) on its way to the grid, seen so that groups run along rows: (rows, n)."""

    LEARNT = ("t", "A1", "A2", "share")

    def __init__(self, W: Tensor, sizes: Tensor, scheme: Scheme, rank: int, seed: int, before: Mapping[str, Tensor]):
        self.t = (
            before["t"]
            if before
            else (sizes / boundary(sizes)).nan_to_num(1, posinf=1).clamp(min=1).sqrt().float().to(W.device)
        )
        top = boundary(W.abs().flatten())
        M = rows_of(W.clamp(-top, top) * self.t.to(W), scheme)
        self.scheme, (rows, n) = scheme.model_copy(update={"balanced": True}), M.shape
        self.scales, self.zeros = ranges(grouped(M, scheme), scheme)
        steps = M / spread(self.scales.to(M), n, scheme)
        self.z: Any = scheme.offset if self.zeros is None else spread(self.zeros.to(M), n, scheme)
        self.base = steps.floor()
        self.V0 = ((steps - self.base - GAMMA) / (ZETA - GAMMA)).logit()
        drawn = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed), dtype=M.dtype).to(M.device)
        start = before or {
            "A1": drawn,
            "A2": M.new_zeros(rank, n),
            "share": torch.ones_like(self.scales, dtype=M.dtype),
        }
        self.A1, self.A2, self.share = (start[name].clone().requires_grad_() for name in ("A1", "A2", "share"))

    def delta(self) -> Tensor:
        return stretched(self.V0 + self.A1 @ self.A2)

    def value(self, delta: Tensor) -> Tensor:
        """Ŵ (out, in) with Δ hardened, for inputs as they are; its gradients are those of Δ."""
        hard = delta + ((delta >= 0.5).to(delta) - delta).detach()
        s = spread(self.scales.to(delta) * self.share, delta.shape[1], self.scheme)
        q = (self.base + self.z + hard).clamp(0, self.scheme.levels - 1)
        return rows_of((q - self.z) * s, self.scheme) / self.t.to(delta)

    def inputs(self, x: Tensor) -> Tensor:
        t = self.t.to(x.dtype)
        return x if self.scheme.activations is None else rounded(x / t, self.scheme.activations) * t

    @torch.no_grad()
    def packed(self) -> Packed:
        q = (self.base + self.z + (self.delta() >= 0.5)).clamp(0, self.scheme.levels - 1)
        scales = (self.scales.to(self.share) * self.share).to(self.scales.dtype)
        return Packed(pack(q, self.scheme), scales, self.zeros, balance=self.t)


def stretched(V: Tensor) -> Tensor:
    """Δ of V: 0.5 for 0, and all of 0 or 1 from |V| = ln 11 on."""
    return (V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def undecided(delta: Tensor, beta: float) -> Tensor:
    """1 − |2Δ − 1|^β: 0 where Δ is 0 or 1. The paper's summary prints (1 − |2Δ − 1|)^β; this is AdaRound's."""
    return 1 - (2 * delta - 1).abs() ** beta


def divergence(h: Tensor, y: Tensor) -> Tensor:
    """KL(softmax h ‖ softmax y), the mean over tokens."""
    p, q = h.log_softmax(-1), y.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def boundary(sizes: Tensor) -> Tensor:
    """The largest of the sizes that is no outlier: of those above T = Q3 + 1.5 IQR only a tail that stands apart is.

    The tail begins where the squared gap before it, less the variance within it, is largest.
    """
    v = sizes.double().sort().values
    at = torch.tensor([0.25, 0.75], dtype=v.dtype) * (len(v) - 1)
    low, high = (torch.lerp(v[int(i)], v[min(int(i) + 1, len(v) - 1)], float(i % 1)) for i in at)
    first = int((v <= high + 1.5 * (high - low)).sum())
    tail, count = v[first:], torch.arange(len(v) - first, 0, -1, dtype=v.dtype, device=v.device)
    if not len(tail):
        return v[-1].to(sizes)
    mean, square = (x.flip(0).cumsum(0).flip(0) / count for x in (tail, tail.square()))
    gaps = (v[first:] - v[first - 1 : -1]).square() - (square - mean.square())
    return v[first - 1 + int(gaps.argmax())].to(sizes)
