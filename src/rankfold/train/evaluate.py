"""Held-out loss, perplexity and accuracy: the same figures for a report, the curve of a run, and `rankfold eval`."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.train.encode import IGNORED
from rankfold.train.recipe import Task


@dataclass(frozen=True)
class Score:
    """`loss` is the mean cross-entropy over every token (or row, for a class) of the data, however it was batched.
    `count` is how many those are; `accuracy` is the share of rows whose class was found, for classification."""

    loss: float
    count: int
    accuracy: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), for tasks over tokens."""
        return None if self.accuracy is not None else math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, float]:
        values = {"loss": self.loss, "count": self.count, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return {name: value for name, value in values.items() if value is not None}


def counted_labels(labels: Tensor, task: Task) -> int:
    """How many labels the loss is a mean over: for a causal model the first token of a row is no target."""
    if task == "causal-lm":
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    task: Task,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    on_batch: Callable[[], Any] = lambda: None,
) -> Score:
    """Measure `model` on batches of its inputs with `labels`. It is in eval mode meanwhile, and as before afterwards.

    `reduce` adds up a tensor of sums over processes; `on_batch` is called after each batch (for a progress bar).
    """
    sums = torch.zeros(3, dtype=torch.float64)  # loss, labels, rows whose class was right
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
            outputs = model(**inputs)
            count = counted_labels(inputs["labels"], task)
            right = (outputs.logits.argmax(-1) == inputs["labels"]).sum() if task.endswith("classification") else 0
            sums += torch.tensor([float(outputs.loss) * count, count, int(right)], dtype=torch.float64)
            on_batch()
    finally:
        model.train(was_training)
    loss, count, right = reduce(sums).tolist()
    return Score(loss / count, int(count), right / count if task.endswith("classification") else None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
