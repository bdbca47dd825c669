"""Statistics block by block, where what is done to a block changes what the next ones see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.calibration import calibrate
from rankfold.core.calibration.answers import Calibration
from rankfold.core.calibration.layers import forward, to_device
from rankfold.core.calibration.statistics import Statistic
from rankfold.core.calibration.surroundings import at_rest
from rankfold.core.targets import layer_of


@dataclass
class _Call:
    """What a block was called with: its hidden states x, the rest of the arguments, and the masks of the batch."""

    x: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    masks: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        y = block(self.x, *self.rest, **self.named)
        return y if isinstance(y, Tensor) else y[0]


def by_block(
    model: nn.Module, batches: Iterable[Any], statistics: Sequence[Statistic[Any]], paths: Sequence[str]
) -> Iterator[tuple[dict[str, str], Calibration]]:
    """For each repeated block of the model in turn: the paths that are in it, by their names in the calibration.

    A block sees what the blocks before it give by now: change one before asking for the next. Within a block statistics
    are those of the model as it is then; layers in no block come first. Where each block's input is the output of the
    one before, blocks run alone, else the model runs for each.
    """
    batches, blocks = list(batches), dict[str, list[str]]()
    for path in paths:
        block = layer_of(f"{path}.")
        blocks.setdefault("" if block is None or block == path else block, []).append(path)
    if outside := blocks.pop("", []):
        yield {path: path for path in outside}, calibrate(model, batches, statistics, outside)
    stacks: dict[str, list[str]] = {}
    for block in blocks:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for stack in stacks.values():
        calls: list[list[_Call]] = []  # of each block that is to come
        for i, block in enumerate(stack):
            module, names = model.get_submodule(block), {path.removeprefix(f"{block}."): path for path in blocks[block]}
            if not calls:
                calls = _calls(model, [model.get_submodule(later) for later in stack[i:]], batches)
            own = calls.pop(0)
            given = [{**call.masks, "call": call} for call in own]
            yield names, calibrate(module, given, statistics, list(names), loss=lambda m, batch: batch["call"].run(m))
            if calls:
                with _at_rest(module):
                    for call, later in zip(own, calls[0], strict=True):
                        later.x = call.run(module)


def _calls(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Any]) -> list[list[_Call]]:
    """Each batch's call of each block; of the first block alone where the next ones do not see its output."""
    calls: list[list[_Call]] = [[] for _ in blocks]
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def before(i: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        first, *rest = args or (named["hidden_states"],)
        named = named if args else {key: value for key, value in named.items() if key != "hidden_states"}
        inputs[i] = first
        # Of later blocks only the other arguments are kept: what they will see is yet to be.
        calls[i].append(_Call(first if i == 0 else first.new_empty(0), tuple(rest), named, masks))

    def behind(i: int, y: Any) -> None:
        outputs[i] = y if isinstance(y, Tensor) else y[0]

    hooks = []
    for i, block in enumerate(blocks):
        hooks += [
            block.register_forward_pre_hook(lambda _, args, named, i=i: before(i, args, named), with_kwargs=True),
            block.register_forward_hook(lambda _, args, y, i=i: behind(i, y)),
        ]
    chained, device = True, next(model.parameters()).device
    try:
        for given in batches:
            batch = to_device(given, device)
            told = batch if isinstance(batch, Mapping) else {}
            masks = {key: value for key, value in told.items() if key == "labels" or key.endswith("attention_mask")}
            with _at_rest(model):
                forward(model, batch)
            chained &= all(inputs[i + 1] is outputs[i] for i in range(len(blocks) - 1))
    finally:
        for hook in hooks:
            hook.remove()
    return calls if chained else calls[:1]


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    """In eval mode, and without a cache of keys and values, which a second run of a block would make longer."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", False)
    with torch.no_grad(), at_rest(model):
        if cached:
            config.use_cache = False
        try:
            yield
        finally:
            if cached:
                config.use_cache = cached
