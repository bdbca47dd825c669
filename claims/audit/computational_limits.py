"""Attention by polynomial features: linear in the length, and how many features it takes as the entries grow."""

import math
import statistics
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor

from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS
from rankfold.audit.limits import feature_attention

D, LENGTH, DEGREE, PRECISION, MOST = 4, 512, 3, 1e-3, 16
EXPONENT, WIDTH = "exponent of the time in the length", "features a token"


@dataclass(frozen=True)
class Drawn:
    model: str = "one head of attention, width 4, logits q·k / 4"
    data: str = "queries and keys drawn evenly from [-Γ, Γ]"


TASKS["drawn attention"] = Drawn()


def drawn(length: int, largest: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    Q, K = ((2 * torch.rand(length, D, generator=rng, dtype=torch.float64) - 1) * largest for _ in range(2))
    return Q / D, K, torch.randn(length, D, generator=rng, dtype=torch.float64)


def exact(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    return (Q @ K.mT).softmax(-1) @ V


def seconds(length: int, degree: int | None, seed: int) -> float:
    """The median of five forward and backward passes."""
    found = []
    for _ in range(6):
        Q, K, V = (part.requires_grad_() for part in drawn(length, 1.0, seed))
        started = process_time()
        (exact(Q, K, V) if degree is None else feature_attention(Q, K, V, degree)).square().sum().backward()
        found.append(process_time() - started)
    return statistics.median(found[1:])


def width(largest: float, seed: int) -> float:
    """How many features a token bring the relative error of the output under a thousandth."""
    Q, K, V = drawn(LENGTH, largest, seed)
    wanted = exact(Q, K, V)
    for degree in range(MOST + 1):
        if float((feature_attention(Q, K, V, degree) - wanted).norm() / wanted.norm()) < PRECISION:
            break
    return float(math.comb(D + degree, degree))


def measured(loaded: Any, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    assert side.method is not None
    how = side.method["name"]
    if how in ("linear", "quadratic"):
        return {"held-out loss": 0.0, EXPONENT: 1.0 if how == "linear" else 2.0, WIDTH: 0.0}
    if how == "entries":
        return {
            "held-out loss": 0.0,
            EXPONENT: 0.0,
            WIDTH: width(side.method["of"] * math.sqrt(math.log(LENGTH)), seed),
        }
    if how == "length":
        return {"held-out loss": 0.0, EXPONENT: 0.0, WIDTH: float(LENGTH)}
    lengths, degree = ((2**14, 2**16), DEGREE) if how == "features" else ((2**10, 2**12), None)
    times = [seconds(length, degree, seed) for length in lengths]
    return {"held-out loss": 0.0, EXPONENT: math.log(times[1] / times[0], 4), WIDTH: 0.0}


def side(name: str, of: float = 0.0) -> Side:
    return Side({"name": name, "of": of}, lr=0.0)


run(
    claim="With features the time of attention and its gradients is linear in the length, without them quadratic; and "
    "an error of a thousandth takes more features than there are tokens once entries reach √(ln L).",
    source="arXiv 2406.03136",
    task="drawn attention",
    sides={
        "features": side("features"),
        "exact": side("exact"),
        "linear": side("linear"),
        "quadratic": side("quadratic"),
        "entries to ¼ √(ln L)": side("entries", 0.25),
        "entries to ½ √(ln L)": side("entries", 0.5),
        "entries to √(ln L)": side("entries", 1.0),
        "the length": side("length"),
    },
    expects=[
        Expect("features", "linear", EXPONENT, by=0.15),
        Expect("linear", "features", EXPONENT, by=0.15),
        Expect("quadratic", "exact", EXPONENT, by=0.15),
        Expect("entries to ½ √(ln L)", "the length", WIDTH),
        Expect("the length", "entries to √(ln L)", WIDTH),
    ],
    how=measured,
    note="L is 512 for the number of features. For the time, of the processor, it is 16,384 and 65,536 with features "
    "up to degree 3, 1,024 and 4,096 without.",
)
