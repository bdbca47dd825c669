"""PSEC: two skills of a diffusion policy for a point in the plane, composed on three levels."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS
from rankfold.compose.psec import compose, working_range
from rankfold.deltas.psec import context

T, WIDTH, DATA = 5, 64, 64
DIAGONAL, HALVES = "error on the diagonal", "error on the halves"
_betas = 1 - torch.exp(-0.1 / T - 0.5 * 9.9 * (2 * torch.arange(1, T + 1) - 1) / T**2)  # variance preserving
_alphas, _bars = 1 - _betas, (1 - _betas).cumprod(0)
Noise = Callable[[Tensor, Tensor, Tensor], Tensor]  # of states (rows, 2), noisy actions (rows, 2) and steps (rows,)


@dataclass(frozen=True)
class Points:
    model: str = "diffusion policy of four linear layers, width 64, T = 5"
    data: str = "states in a square, actions in the plane; 64 pairs of the target"


TASKS["points"] = Points()


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4 + T, WIDTH), nn.Linear(WIDTH, 2)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, s: Tensor, a: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.cat([s, a, nn.functional.one_hot(t, T).to(a.dtype)], 1))
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))


def wanted(name: str, s: Tensor) -> Tensor:
    """The action (rows, 2) in each state: a direction that bends a little with the state."""
    turn = 0.3 * s.prod(1)
    angle = {"left": math.pi + turn, "up": math.pi / 2 + turn, "diagonal": 3 * math.pi / 4 + turn}
    angle["halves"] = torch.where(s[:, 0] < 0, angle["left"], angle["up"])
    angle["any"] = 2 * math.pi * torch.rand(len(s), generator=torch.Generator().manual_seed(len(s)))
    return torch.stack([angle[name].cos(), angle[name].sin()], 1)


def states(count: int, rng: torch.Generator) -> Tensor:
    return 2 * torch.rand(count, 2, generator=rng) - 1


def cloning(noise: Noise, s: Tensor, a: Tensor, rng: torch.Generator) -> Tensor:
    """Diffusion behaviour cloning: ‖ε̂ − ε‖²."""
    t = torch.randint(T, (len(s),), generator=rng)
    e, bar = torch.randn(a.shape, generator=rng), _bars[t, None]
    return (noise(s, bar.sqrt() * a + (1 - bar).sqrt() * e, t) - e).square().sum(1).mean()


def sample(noise: Noise, s: Tensor, rng: torch.Generator) -> Tensor:
    a = torch.randn(len(s), 2, generator=rng)
    for t in reversed(range(T)):
        e = noise(s, a, torch.full((len(s),), t))
        a = (a - _betas[t] / (1 - _bars[t]).sqrt() * e) / _alphas[t].sqrt()
        a = a + _betas[t].sqrt() * torch.randn(a.shape, generator=rng) if t else a.clamp(-1, 1)
    return a


def fitted(loss: Callable[[int], Tensor], parameters: Any, lr: float, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()


@functools.cache
def skilled(seed: int) -> Policy:
    """A policy that goes anywhere, with the skills "left" and "up" as LoRAs of rank 8 and scale 16."""
    torch.manual_seed(seed)
    rng, model = torch.Generator().manual_seed(seed), Policy()

    def on(name: str) -> Callable[[int], Tensor]:
        def loss(step: int) -> Tensor:
            s = states(256, rng)
            return cloning(model, s, wanted(name, s), rng)

        return loss

    fitted(on("any"), model.parameters(), 3e-3, 800)
    for name in ("left", "up"):
        narrow = {"last": {"rank": 2, "alpha": 32}}  # two actions; the scale stays
        skill = rankfold.attach(model, rankfold.LoRA(rank=8, alpha=128), ".*", name, seed=seed, overrides=narrow)
        fitted(on(name), skill.parameters(), 3e-4, 800)
    return model


def composed(loaded: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """The mean squared error of sampled actions on both targets; the weights come from an MLP of the state."""
    assert side.method is not None
    found = {}
    for target, what in (("diagonal", DIAGONAL), ("halves", HALVES)):
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(1000 + seed)
        act = _learned(side.method["name"], skilled(seed), target, side, rng)
        s = states(2000, rng)
        with torch.no_grad():
            found[what] = float((act(s, rng) - wanted(target, s)).square().sum(1).mean())
    return {**found, "held-out loss": (found[DIAGONAL] + found[HALVES]) / 2}


def _learned(
    level: str, model: Policy, target: str, side: Side, rng: torch.Generator
) -> Callable[[Tensor, torch.Generator], Tensor]:
    s = states(DATA, rng)
    a = wanted(target, s)

    def by(name: str) -> Noise:
        def noise(*inputs: Tensor) -> Tensor:
            with rankfold.using(model, name):
                return model(*inputs)

        return noise

    if level in ("parameter", "constant"):
        skills = {name: rankfold.adapters(model)[name] for name in ("left", "up")}
        how: Any = {"weights": "context", "width": 2} if level == "parameter" else {"weights": "learned"}
        adapter: Any = compose(model, skills, start=(0.5, 0.5), **how)

        def weighed(s: Tensor, a: Tensor, t: Tensor) -> Tensor:
            with rankfold.using(model, "composed"):
                if level == "constant":
                    return model(s, a, t)
                with context(model, s):
                    return model(s, a, t)

        def loss(step: int) -> Tensor:
            penalty = working_range(adapter.shared(s)) if side.merge == {"penalty": True} else torch.zeros(())
            return cloning(weighed, s, a, rng) + penalty

        fitted(loss, adapter.parameters(), float(side.lr), side.steps or 0)  # type: ignore[arg-type]
        whole = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        rankfold.detach(model, "composed")

        def act(s: Tensor, rng: torch.Generator) -> Tensor:
            again = compose(model, skills, start=(0.5, 0.5), **how)
            again.load_state_dict(whole)
            try:
                return sample(weighed, s, rng)
            finally:
                rankfold.detach(model, "composed")

        return act

    weights = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    nn.init.zeros_(weights[-1].weight)
    nn.init.constant_(weights[-1].bias, 0.5)

    def mixed(s: Tensor, a: Tensor, t: Tensor) -> Tensor:
        w = weights(s)
        return w[:, :1] * by("left")(s, a, t) + w[:, 1:] * by("up")(s, a, t)

    def acting(s: Tensor, rng: torch.Generator) -> Tensor:
        w = weights(s)
        with torch.no_grad():
            left, up = (sample(by(name), s, rng) for name in ("left", "up"))
        return w[:, :1] * left + w[:, 1:] * up

    if level == "noise":
        fitted(lambda step: cloning(mixed, s, a, rng), weights.parameters(), float(side.lr), side.steps or 0)  # type: ignore[arg-type]
        return lambda s, rng: sample(mixed, s, rng)
    fitted(
        lambda step: (acting(s, rng) - a).square().sum(1).mean(), weights.parameters(), float(side.lr), side.steps or 0
    )  # type: ignore[arg-type]
    return acting


def level(name: str, **options: Any) -> Side:
    return Side({"name": name}, lr=2e-3, steps=200, **options)


run(
    claim="With weights from an MLP of the state and as many data, skills composed in parameter space have a smaller "
    "error than composed as noise, and those than as actions; weights that hang on the state have a smaller one than "
    "fixed weights where the target changes with the state.",
    source="arXiv 2502.05932",
    task="points",
    sides={
        "parameter": level("parameter"),
        "parameter, with the authors' penalty": level("parameter", merge={"penalty": True}),
        "noise": level("noise"),
        "action": level("action"),
        "parameter, fixed weights": level("constant"),
    },
    expects=[
        Expect("parameter", "noise", DIAGONAL),
        Expect("noise", "action", DIAGONAL),
        Expect("parameter", "noise", HALVES),
        Expect("noise", "action", HALVES),
        Expect("parameter", "parameter, fixed weights", HALVES),
    ],
    how=composed,
)
