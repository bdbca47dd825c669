"""Two networks of the same task, brought together by the order of their hidden units."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims.harness import Expect, Measure, Side, run
from claims.tasks import TASKS
from rankfold.compose.weight_matching import Layer, alignment, barrier, match, match_by_loss, permute

BARRIER, LEFT, DISTANCE, APART, THREE = (
    "barrier", "share of the barrier that is left", "share of the distance that is left", "1 − R", "barrier of three"
)  # fmt: skip


@dataclass(frozen=True)
class Digits:
    model: str = "two MLPs of two hidden layers, each from a start of its own"
    data: str = "scikit-learn's handwritten digits, 8x8"


def matched(digits: Digits, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Train three networks, permute the second and the third, and measure what lies between them and the first."""
    assert side.method is not None
    width, how = side.method["width"], side.method["name"]
    a, *others = (network(width, side.steps or 0, side.lr, 10 * seed + i) for i in range(3))
    train, held_out = (functools.partial(loss, images=x, labels=y) for x, y in data())

    def order(b: list[Layer]) -> list[Layer]:
        if how == "as they are":
            return b
        return permute(
            b, match(a, b, seed=seed) if how == "weights" else match_by_loss(a, b, train, steps=40, seed=seed)
        )

    b, c = map(order, others)
    before, after = barrier(held_out, a, others[0]), barrier(held_out, a, b)
    ends = [held_out(one) for one in (a, b, c)]
    found = {
        "held-out loss": float(held_out(mean([a, b]))),
        BARRIER: after,
        LEFT: after / before,
        DISTANCE: distance(a, b) / distance(a, others[0]),
        APART: 1 - alignment(a, b),
        THREE: float(held_out(mean([a, b, c])) - sum(ends) / 3),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


@functools.cache
def network(width: int, steps: int, lr: float, seed: int) -> list[Layer]:
    torch.manual_seed(seed)
    sizes = [64, width, width, 10]
    layers = [nn.Linear(in_, out) for in_, out in itertools.pairwise(sizes)]
    weights = [(layer.weight, layer.bias) for layer in layers]
    optimizer = torch.optim.AdamW([t for layer in weights for t in layer], lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    images, labels = data()[0]
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss(weights, images[rows], labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [(W.detach(), b.detach()) for W, b in weights]


@functools.cache
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 64) and labels to train on, and held-out ones: every fifth."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.data / 16 - 0.3, dtype=torch.float32), torch.tensor(found.target)
    last = torch.arange(len(images)) % 5 == 4
    return (images[~last], labels[~last]), (images[last], labels[last])


def loss(layers: Sequence[Layer], images: Tensor, labels: Tensor) -> Tensor:
    for W, b in layers[:-1]:
        images = F.linear(images, W, b).relu()
    return F.cross_entropy(F.linear(images, *layers[-1]), labels)


def mean(networks: Sequence[Sequence[Layer]]) -> list[Layer]:
    return [tuple(torch.stack(t).mean(0) for t in zip(*layers, strict=True)) for layers in zip(*networks, strict=True)]


def distance(a: Sequence[Layer], b: Sequence[Layer]) -> float:
    flat = [torch.cat([t.flatten() for layer in layers for t in layer]) for layers in (a, b)]
    return float(torch.dist(*flat))


def side(name: str, width: int = 256) -> Side:
    return Side({"name": name, "width": width}, lr=3e-3, steps=450)


TASKS["digits by an MLP"] = Digits()

run(
    claim="Matching hidden units by weights takes away over four fifths of the barrier between two networks and less "
    "than a fifth of their distance: it aligns the leading singular vectors. Wider networks have lower barriers. Of "
    "three networks matched to one it leaves less of a barrier than matching by the loss (STE), which aligns less.",
    source="arXiv 2402.04051",
    task="digits by an MLP",
    sides={
        "as they are": side("as they are"),
        "by weights": side("weights"),
        "by loss": side("loss"),
        "by weights, width 64": side("weights", 64),
    },
    expects=[
        Expect("by weights", "as they are", LEFT, by=-0.8),
        Expect("as they are", "by weights", DISTANCE, by=0.2),
        Expect("by weights", "as they are", APART),
        Expect("by weights", "by loss", APART),
        Expect("by weights", "by weights, width 64", BARRIER),
        Expect("by weights", "by loss", THREE),
    ],
    how=matched,
    note="Width 256, held-out losses. Matching by the loss starts from the match by weights and takes 40 steps on all "
    "training data; on so small a task it keeps that alignment, and its three networks are nearer than theirs.",
)
