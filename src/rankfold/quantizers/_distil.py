"""A quantised model that learns to say what it said as a float one: for quantisers and compensations that train."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rankfold.core.calibration.layers import forward, masks, to_device
from rankfold.errors import RankfoldError
from rankfold.quantizers._work import Work

Trained = Callable[[int, int], object]
PATIENCE = 60.0  # seconds of work that may be lost
_STEPS = "training"


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


class Lesson(NamedTuple):
    """Batches, and what the float model said of them.

    `trained` is told after each step how many are done, of all; in `work` they are kept, so as to go on from there.
    """

    batches: Sequence[Any]
    teacher: Teacher
    trained: Trained
    work: Work | None


class Pupil(Protocol):
    """What learns: `step` moves it by the gradients that it finds in its `parameters`.

    `tensors` are all that it is, its optimisers' state too, and `put` takes them back.
    """

    @property
    def parameters(self) -> Sequence[nn.Parameter]: ...

    def step(self, share: float) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def put(self, tensors: Mapping[str, Tensor]) -> None: ...


def distil(model: nn.Module, pupil: Pupil, lesson: Lesson, *, epochs: int, seed: int) -> None:
    """Bring the model nearer to what it said: batches in random order, `epochs` times.

    A step takes the share of the learning rate, which falls to 0. Where the lesson has a folder of work, steps are kept
    there: at the end, and each minute, or more seldom where writing would take over a twentieth of the time.
    """
    (batches, teacher, trained, work), parameters = lesson, pupil.parameters
    total = epochs * len(batches)
    before = _again(pupil, work)
    due = time.monotonic() + PATIENCE
    with torch.enable_grad(), in_eval(model):
        for number, i in enumerate(_turns(len(batches), epochs, torch.Generator().manual_seed(seed))):
            if number < before:
                continue
            loss = divergence(scores(model, batches[i]), teacher[i], batches[i])
            for p, grad in zip(parameters, torch.autograd.grad(loss, list(parameters)), strict=True):
                p.grad = grad
            pupil.step((1 + math.cos(math.pi * number / total)) / 2)
            for p in parameters:
                p.grad = None
            if work is not None and ((started := time.monotonic()) >= due or number + 1 == total):
                work.write_tensors(_STEPS, {**pupil.tensors(), "steps": torch.tensor(number + 1)})
                due = time.monotonic() + max(PATIENCE, 20 * (time.monotonic() - started))
            trained(number + 1, total)


def _again(pupil: Pupil, work: Work | None) -> int:
    """How many steps are done in the folder of work; the pupil is then as they left it."""
    if work is None or (tensors := work.read_tensors(_STEPS)) is None:
        return 0
    try:
        pupil.put(tensors)
        return int(tensors["steps"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise RankfoldError(f"{work.path(_STEPS)} is damaged, remove it: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Its state, for `put_optimizer`."""
    each = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": value for i, state in each.items() for name, value in state.items()}


def put_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimizer the state of another."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}."):
            i, name = key.removeprefix(f"{prefix}.").split(".")
            state.setdefault(int(i), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
