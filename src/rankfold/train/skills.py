"""The weights of skills, learnt on a recipe's data (PSEC): a handful of numbers, while the skills stay as they are."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from rankfold.compose.psec import Library
from rankfold.errors import RankfoldError
from rankfold.train.display import Display
from rankfold.train.inputs import load_inputs
from rankfold.train.plan import Parts, build_optimizer
from rankfold.train.recipe import Recipe
from rankfold.train.run import make_trainer, run_to_end
from rankfold.train.trainer import ADAPTER
from rankfold.train.watch import read_metrics


@dataclass(frozen=True)
class Learnt:
    """α by skill, and the held-out loss with the weights at the start and at the end."""

    weights: dict[str, float]
    before: float
    after: float
    steps: int


def learn(
    recipe: Recipe,
    library: Library,
    names: Sequence[str],
    output: str | Path,
    *,
    start: Sequence[float] | None = None,
    force: bool = False,
    display: Display | None = None,
) -> Learnt:
    """Train α for the recipe's model and data, by its optimizer, schedule and budget, and save `output`/adapter.

    The recipe's method, init and callbacks have no part in it. Raises RankfoldError for a recipe that trains a module
    in full, a new head for one: skills have none.
    """
    output, display = Path(output), display or Display()
    set_seed(recipe.seed)
    inputs = load_inputs(recipe, display)
    if inputs.recipe.modules_to_save:
        raise RankfoldError(
            f"modules_to_save: {', '.join(inputs.recipe.modules_to_save)} would have to be trained, and skills are "
            "weighed on a model that can do the task's kind of output already"
        )
    with display.phase("composing the skills"):
        adapter: Any = library.compose(inputs.model, names, start=start, force=force)
    parts = Parts(method=None, init=None, callbacks=(), optimizer=build_optimizer(recipe.optimizer))
    trainer, progress, interrupt = make_trainer(inputs, parts, adapter, output, None, display)
    run_to_end(trainer, progress, interrupt, None, display)
    trainer.save_model(str(output / ADAPTER))
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # nothing goes on from them
    losses = [line["held_out_loss"] for line in read_metrics(output / "metrics.jsonl") if "held_out_loss" in line]
    weights = dict(zip(names, adapter.shared.alpha.tolist(), strict=True))
    return Learnt(weights, losses[0], losses[-1], progress.step)
