"""A quantised model that learns to say what it said as a float one: for quantisers and compensations that train."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.calibration.layers import forward, masks, to_device

Trained = Callable[[int, int], object]


class Teacher:
    """log p of every token of every batch, of the model as it is now: on disk, in 16 bits, until this object goes."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]):
        from safetensors.torch import save_file

        self.folder = tempfile.TemporaryDirectory(prefix="rankfold-")
        with torch.no_grad(), in_eval(model):
            for i, batch in enumerate(batches):
                log_p = scores(model, batch).float().log_softmax(-1)
                save_file({"log_p": log_p.half().cpu().contiguous()}, self._file(i))

    def __getitem__(self, i: int) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self._file(i))["log_p"]

    def _file(self, i: int) -> Path:
        return Path(self.folder.name) / f"{i}.safetensors"


def scores(model: nn.Module, batch: Any) -> Tensor:
    """What the model gives a batch: its logits (..., classes), or its only output."""
    given = forward(model, to_device(batch, next(model.parameters()).device))
    found = getattr(given, "logits", given)
    return found[0] if isinstance(found, tuple) else found


def divergence(y: Tensor, log_p: Tensor, batch: Any = None) -> Tensor:
    """KL(p ‖ softmax(y)), the mean over the tokens that count; y and log p (..., classes)."""
    log_p = log_p.to(y.device, torch.float32)
    each = (log_p.exp() * (log_p - y.float().log_softmax(-1))).sum(-1)
    mask = masks(batch).get(tuple(each.shape))
    return each.mean() if mask is None else each[mask.to(each.device)].mean()


def distil(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    teacher: Teacher,
    *,
    step: Callable[[float], None],
    epochs: int,
    seed: int,
    trained: Trained,
) -> None:
    """Bring the model nearer to its teacher: batches in random order, `epochs` times.

    Gradients are left in `parameters`; `step` takes one, with the share of the learning rate, which falls to 0. Then
    `trained` is told how many are done, of all.
    """
    order = torch.Generator().manual_seed(seed)
    total = epochs * len(batches)
    with torch.enable_grad(), in_eval(model):
        for number, i in enumerate(_turns(len(batches), epochs, order)):
            loss = divergence(scores(model, batches[i]), teacher[i], batches[i])
            for p, grad in zip(parameters, torch.autograd.grad(loss, list(parameters)), strict=True):
                p.grad = grad
            step((1 + math.cos(math.pi * number / total)) / 2)
            for p in parameters:
                p.grad = None
            trained(number + 1, total)


def _turns(n: int, epochs: int, order: torch.Generator) -> Iterator[int]:
    for _ in range(epochs):
        yield from torch.randperm(n, generator=order).tolist()


class in_eval:  # noqa: N801 (it reads as a function)
    """The model in eval mode, and afterwards each module in its own."""

    def __init__(self, model: nn.Module):
        self.modes = [(module, module.training) for module in model.modules()]
        model.eval()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode
