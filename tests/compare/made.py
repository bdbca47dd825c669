"""A comparison as it might have come out, made up: no model is trained."""

import random
from typing import Any

from rankfold.compare.result import (
    Comparison,
    Contender,
    Failure,
    Forgetting,
    Inference,
    Layer,
    Point,
    RunResult,
    Size,
    Trial,
)

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def run(seed: int, final: float, cost: float = 1.0, **changes: Any) -> RunResult:
    draw = random.Random(f"{seed} {final} {cost}")
    steps = range(0, 61, 10)
    losses = [final + (2.1 - final) * 0.94**step + draw.gauss(0, 0.004) * (step > 0) for step in steps]
    curve = tuple(Point(step=s, seconds=s * 0.4 * cost, loss=loss) for s, loss in zip(steps, losses, strict=True))
    layers = tuple(
        Layer(site=f"model.layers.{block}.{kind}", rank=8, norm=0.2, stable_rank=2.0,
              relative_norm=0.01 * cost * (1 + block / 6 + i / 4),
              effective_rank=min(8.0, 3 * cost + i + 0.2 * block + draw.random()))
        for block in range(6)
        for i, kind in enumerate(KINDS)
    )  # fmt: skip
    given: dict[str, Any] = {
        "seed": seed,
        "lr": 1e-3,
        "quality": losses[-1],
        "before": {"loss": 2.1, "count": 4000.0},
        "after": {"loss": losses[-1], "count": 4000.0},
        "curve": curve,
        "training": ((1, 2.1), (60, final)),
        "steps": 60,
        "seconds": 24 * cost,
        "step_seconds": (0.4 + draw.gauss(0, 0.005)) * cost,
        "parameters": round(200_000 * cost),
        "file_bytes": round(810_000 * cost),
        "peak_memory": round((4.1e8 + draw.gauss(0, 3e6)) * cost**0.5),
        "micro_batch": 4,
        "forgetting": Forgetting(loss=0.02 * cost + draw.gauss(0, 0.002), low=0.01, high=0.04, base=3.1),
        "inference": Inference(base=0.20, unmerged=0.2 + 0.03 * cost, merged=0.2),
        "layers": layers,
        "missing": {},
        "finished": "2026-11-23T15:00:00+00:00",
    }
    return RunResult(**given | changes)


def contender(name: str, final: float, cost: float = 1.0, seeds: int = 3, **changes: Any) -> Contender:
    """Without a search and without layers, which take the page its time to draw."""
    given: dict[str, Any] = {
        "name": name,
        "axis": "deltas",
        "changes": {"method": {"name": name}},
        "size": Size(field="rank", value=8.0, parameters=round(200_000 * cost), budget=210_000),
        "lr": 1e-3,
        "trials": (),
        "runs": tuple(run(seed, final, cost, layers=()) for seed in range(seeds)),
        "failures": (),
    }
    return Contender(**given | changes)


def whole(name: str, final: float, cost: float = 1.0) -> Contender:
    trials = tuple(
        Trial(number=i, lr=lr, state="pruned" if i == 3 else "complete", loss=None if i == 3 else final + 0.1 + 0.1 * i,
              curve=(Point(step=20, seconds=8, loss=final + 0.5),))
        for i, lr in enumerate((1e-3, 3e-3, 3e-4, 1e-2))
    )  # fmt: skip
    return contender(name, final, cost, trials=trials, runs=tuple(run(seed, final, cost) for seed in range(3)))


def failed(name: str = "broken", reason: str = "RankfoldError: no such layer") -> Contender:
    failure = Failure(seed=None, reason=reason)
    return contender(name, 1.0, runs=(), size=None, lr=None, failures=(failure,))


def comparison(*contenders: Contender, **changes: Any) -> Comparison:
    some = contenders or (
        whole("lora", 1.40),
        whole("dora", 1.402, 1.6),
        whole("kasa:rank=4", 1.46, 0.5),
        whole("vera", 1.62, 0.06),
        whole("galore", 1.38, 3.5),
        whole("ia3", 1.8, 0.03),
        failed(),
    )
    given: dict[str, Any] = {
        "title": "Instruction: SmolLM2 on GSM8K",
        "command": "rankfold compare comparisons/instruction.yaml --output runs/instruction",
        "model": "SmolLM2-135M-Instruct",
        "data": "GSM8K",
        "task": "causal-lm",
        "metric": "loss",
        "higher_is_better": False,
        "recipe": {"optimizer": {"name": "adamw", "lr": 1e-3}, "batch": {"size": 4}},
        "budget": {"parameters": 210_000.0},
        "seeds": tuple(range(max((len(c.runs) for c in some), default=1) or 1)),
        "search": {"trials": 4, "low": 1e-4, "high": 1e-2},
        "rows": {"train": 1000, "validation": 64, "test": 128},
        "threads": 1,
        "jobs": 2,
        "device": "cpu",
        "versions": {"rankfold": "0.1.0", "torch": "2.13.0"},
        "started": "2026-11-23T14:00:00+00:00",
        "finished": "2026-11-23T15:00:00+00:00",
        "contenders": some,
        "definitions": {"general text": "eight blocks of 128 tokens"},
    }
    return Comparison(**given | changes)
