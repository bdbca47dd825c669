"""The tasks that claims are tried on: a real pretrained model and real data each, small enough for two CPU cores."""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.train.display import Display
from rankfold.train.inputs import load_inputs
from rankfold.train.recipe_file import read_recipe
from rankfold.train.rows import read_split

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@dataclass(frozen=True)
class Task:
    """A recipe that gives the model and the data, cut to size, and how a run on it goes by default."""

    recipe: str
    changes: tuple[str, ...]
    model: str
    data: str
    targets: tuple[str, ...] | str
    steps: int
    batch: int
    head_lr: float  # of modules that are trained in full beside the adapter
    old: str | None = None  # the task whose texts stand for what the model knew before


TASKS = {
    "digits": Task(
        recipe="digits",
        changes=("data.image_size=28", "data.limit=1200", "data.held_out.limit=300"),
        model="DINOv2-small",
        data="scikit-learn's handwritten digits, 10 classes",
        targets=("fc1", "fc2"),
        steps=40,
        batch=16,
        head_lr=3e-3,
    ),
    "tweets": Task(
        recipe="tweets",
        changes=("data.max_length=24", "data.limit=2000", "data.held_out.limit=300"),
        model="all-MiniLM-L6-v2",
        data="tweets, 3 classes of sentiment",
        targets="all-linear",
        steps=40,
        batch=16,
        head_lr=3e-3,
    ),
    "maths": Task(
        recipe="gsm8k",
        changes=("data.max_length=96", "data.limit=400", "data.held_out.limit=12"),
        model="SmolLM2-135M-Instruct",
        data="GSM8K, question to worked answer, 96 tokens",
        targets=("q_proj", "v_proj"),
        steps=6,
        batch=2,
        head_lr=0.0,
        old="tweets",
    ),
}


Batch = dict[str, torch.Tensor]
Change = Callable[[Batch], Batch]


def same(batch: Batch) -> Batch:
    return batch


class Loaded:
    """A task with its model and data in memory. The base model is never changed, so all runs share it."""

    def __init__(self, task: Task):
        self.task = task
        inputs = load_inputs(read_recipe(RECIPES / f"{task.recipe}.yaml", list(task.changes)), Display())
        self.model: Any = inputs.model
        self.in_full: tuple[str, ...] = tuple(inputs.recipe.modules_to_save or ())
        self._tokenizer: Any = inputs.processor
        self.train, self.held_out, self._collate = inputs.data.train, inputs.data.held_out, inputs.data.collate

    def batches(self, seed: int, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches without end, in an order that the seed gives."""
        rng, size = torch.Generator().manual_seed(seed), size or self.task.batch
        while True:
            order = torch.randperm(len(self.train), generator=rng).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self._collate([self.train[i] for i in order[start : start + size]])

    @torch.no_grad()
    def evaluate(self, change: Change = same) -> dict[str, float]:
        """Held-out loss, and accuracy for classifications, of the model as it stands, on batches after `change`."""
        self.model.eval()
        losses, right, count = [], 0, 0
        for start in range(0, len(self.held_out), 50):
            rows = [self.held_out[i] for i in range(start, min(start + 50, len(self.held_out)))]
            batch = change(self._collate(rows))
            out = self.model(**batch)
            losses.append(float(out.loss) * len(rows))
            count += len(rows)
            if out.logits.dim() == 2:
                right += int((out.logits.argmax(-1) == batch["labels"]).sum())
        found = {"held-out loss": sum(losses) / count}
        return found | ({"accuracy": right / count} if right else {})

    def old_batches(self, count: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
        """Plain texts of another source, as a language model reads them: what it should not forget."""
        assert self.task.old is not None
        other = TASKS[self.task.old]
        data = read_recipe(RECIPES / f"{other.recipe}.yaml", list(other.changes)).data
        texts = read_split(data, 0)[1]["text"][: count * size]
        batches = []
        for start in range(0, len(texts), size):
            batch = self._tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            batches.append({**batch, "labels": labels})
        return batches

    @torch.no_grad()
    def old_loss(self) -> float:
        """The model's loss on those texts, as it stands."""
        self.model.eval()
        return statistics.fmean(float(self.model(**batch).loss) for batch in self.old_batches(4))

    def fresh_heads(self, seed: int) -> None:
        """Draw the modules that are trained in full anew: a pretrained model's new head is random."""
        rng = torch.Generator().manual_seed(seed)
        for path in self.in_full:
            for layer in self.model.get_submodule(path).modules():
                if isinstance(layer, nn.Linear):
                    with torch.no_grad():
                        layer.weight.normal_(0.0, 0.02, generator=rng)
                        layer.bias.zero_()


@functools.cache
def load(name: str) -> Loaded:
    """The task of that name; the first call loads its model and data."""
    return Loaded(TASKS[name])
