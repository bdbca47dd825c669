"""A pretrained model tuned to one loss on a new text, in full or by a LoRA, and what that did to its matrices."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from claims.tasks import TASKS, FromScratch

TASK = "from code"
_LOOK, _MOST = 10, 600  # steps between two looks at the loss, and of a training at most


@dataclass(frozen=True)
class Tuned:
    """The matrices by layer, before and after; nothing else of the model has changed. `model` has the latter."""

    model: Any
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    steps: int

    def change(self, path: str) -> Tensor:
        return self.after[path] - self.before[path]


@functools.cache
def tuned(rank: int | None, lr: float, target: float, seed: int) -> Tuned:
    """Until the held-out loss on the new text is at most `target`. `rank` of a LoRA with α = 2r; None: in full."""
    new = _texts()[0]
    new.fresh(seed)
    model = new.model.requires_grad_(False)
    before = _weights(model)
    if rank is None:
        parameters = [layer.weight.requires_grad_() for layer in _matrices(model).values()]
    else:
        method = rankfold.LoRA(rank=rank, alpha=2 * rank)
        parameters = list(rankfold.attach(model, method, "all-linear", seed=seed).parameters())
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    steps = 0
    for batch in new.batches(seed):
        model.train()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == _MOST or (steps % _LOOK == 0 and losses(model)[0] <= target):
            break
    if rank is not None:
        rankfold.merge(model)
    after = _weights(model)
    return Tuned(with_weights(after), before, after, steps)


def with_weights(weights: Mapping[str, Tensor]) -> Any:
    """The pretrained model with these matrices."""
    new = _texts()[0]
    new.fresh(0)
    with torch.no_grad():
        for path, layer in _matrices(new.model).items():
            layer.weight.copy_(weights[path])
    return new.model.eval()


def losses(model: Any) -> tuple[float, float]:
    """Held out, on the new text and on the old one."""
    found = []
    for text in _texts():
        text.model = model
        found.append(text.evaluate()["held-out loss"])
    return found[0], found[1]


def held_out() -> Tensor:
    """Blocks (n, tokens) of the new text."""
    return _texts()[0].held_out


@functools.cache
def _texts() -> tuple[FromScratch, FromScratch]:
    task: Any = TASKS[TASK]
    return FromScratch(task), FromScratch(replace(task, texts=task.before))


def _matrices(model: Any) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)}


def _weights(model: Any) -> dict[str, Tensor]:
    return {path: layer.weight.detach().clone() for path, layer in _matrices(model).items()}
