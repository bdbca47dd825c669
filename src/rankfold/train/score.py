"""The held-out score of a recipe's model, without and with an adapter."""

import contextlib
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import rankfold
from rankfold.train.display import Display
from rankfold.train.evaluate import Score, evaluate
from rankfold.train.inputs import load_inputs
from rankfold.train.processes import processes
from rankfold.train.recipe import Recipe

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def score(recipe: Recipe, adapter: Path | None, display: Display) -> dict[str, Score]:
    """`{"base": Score}`, and `"adapter"` beside it where a folder is given; on an accelerator where there is one."""
    inputs = load_inputs(recipe, display)
    device = torch.device(processes().device or "cpu")
    model = inputs.model.to(device)
    batches = DataLoader(
        inputs.data.held_out,  # type: ignore[arg-type]
        recipe.batch.eval_size or recipe.batch.size,
        collate_fn=inputs.data.collate,
    )

    def measure(who: str) -> Score:
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if recipe.precision in _AUTOCAST:
            autocast = torch.autocast(device.type, _AUTOCAST[recipe.precision])
        with display.bar(f"measuring the {who}", len(batches)) as advance, autocast:
            return evaluate(model, batches, inputs.recipe.task, on_batch=advance)

    scores = {"base": measure("base")}
    if adapter is not None:
        rankfold.load(model, adapter)
        scores["adapter"] = measure("adapter")
    return scores
