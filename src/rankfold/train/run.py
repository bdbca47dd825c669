"""One training run from a recipe to a report: `rankfold train` in Python."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Subset
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

import rankfold
from rankfold.core.calibration import Calibration
from rankfold.core.files import write_whole
from rankfold.errors import RankfoldError
from rankfold.ranks._plan import RankPlan
from rankfold.train.calibrating import collect, targets_of
from rankfold.train.display import Display
from rankfold.train.errors import TrainingInterruptedError
from rankfold.train.full import Full
from rankfold.train.inputs import Inputs, load_inputs
from rankfold.train.models import save_directory
from rankfold.train.plan import Parts, build_parts, training_arguments
from rankfold.train.processes import processes
from rankfold.train.recipe import Recipe
from rankfold.train.recipe_file import read_recipe, write_recipe
from rankfold.train.report import Report, make_report, write_report
from rankfold.train.samples import Answer, answer_samples
from rankfold.train.schedule import Progress, check_schedule, make_schedule, total_steps
from rankfold.train.stepping import check_stepping
from rankfold.train.trainer import ADAPTER, MODEL, AdapterTrainer
from rankfold.train.watch import BudgetWatch, Interrupt, Metrics, read_metrics, rewind_metrics

# Keys that may differ when a run goes on: how long it runs and what it shows, but nothing a step computes.
_FREE_ON_RESUME = {"budget", "log", "evaluate", "checkpoint", "samples"}


def train(recipe: Recipe, output: str | Path, *, resume: bool = False, display: Display | None = None) -> Report:
    """Train an adapter (for method full, the model itself) as `recipe` says, and write all to the folder `output`:

    | file            | what                                                                              |
    | --------------- | --------------------------------------------------------------------------------- |
    | `adapter/`      | the trained adapter, for `rankfold.load`                                          |
    | `model/`        | in its place, for method full: the model, for `from_pretrained`                   |
    | `report.md`     | before and after, sizes, times, samples (`report.json` the same for machines)     |
    | `loss.png`      | training and held-out loss                                                        |
    | `ranks.png`     | with a rank plan: the rank of each layer over time (`ranks.csv` the same numbers) |
    | `metrics.jsonl` | one line per logged step                                                          |
    | `recipe.yaml`   | the recipe with every default spelled out                                         |
    | `checkpoints/`  | what `resume` goes on from                                                        |

    With `resume`, go on from the last checkpoint in `output` (or start, if there is none): on a CPU the run ends with
    the same weights, bit for bit, as one that was never stopped. Works under `accelerate launch`.

    Raises:
        RankfoldError: something in the recipe cannot be used (the message names the key), or `output` is taken.
        TrainingStoppedError: the loss is not finite, or the adapter gets no gradient.
        TrainingInterruptedError: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    output, main = Path(output), processes().is_main_process
    display = display if display is not None and main else Display()
    parts = build_parts(recipe)
    check_stepping(
        parts.optimizer,
        recipe.optimizer.per_layer,
        parts.callbacks,
        accumulate=recipe.batch.accumulate,
        clip=recipe.optimizer.clip,
        fp16=recipe.precision == "fp16",
        checkpointing=recipe.gradient_checkpointing,
        processes=processes().num_processes,
    )
    check_schedule(recipe.schedule, recipe.budget)
    if main:
        claim(output, recipe, resume)
    processes().wait_for_everyone()
    checkpoint = last_checkpoint(output) if resume else None

    set_seed(recipe.seed)
    inputs = load_inputs(recipe, display)
    recipe = inputs.recipe
    if main:
        write_whole(output / "recipe.yaml", write_recipe(recipe))
        rewind_metrics(output / "metrics.jsonl", -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
    statistics = collect(inputs, parts, display) if checkpoint is None else None
    with display.phase("attaching the adapter"):
        adapter = attach_adapter(inputs, parts, statistics, checkpoint)
    del statistics
    trainer, progress, interrupt = make_trainer(inputs, parts, adapter, output, checkpoint, display)
    answering = main and not trainer.is_fsdp_enabled  # to generate with a sharded model, every process has to take part
    before: list[str] = []
    if isinstance(adapter, Full):  # once it trains, the base is gone
        before = _answers(inputs, display) if answering else []
        if checkpoint is not None:
            adapter.restore(checkpoint / trainer.part)
    with nullcontext() if parts.low_precision is None else parts.low_precision.training(inputs.model):
        run_to_end(trainer, progress, interrupt, checkpoint, display)
    _save(trainer, inputs, output)
    found: list[Any] = [None]
    if main:
        if answering and not isinstance(adapter, Full):
            with rankfold.using(inputs.model, None):
                before = _answers(inputs, display)
        after = _answers(inputs, display) if answering else []
        said = zip(inputs.data.samples, before, after, strict=False)  # there are no answers of a sharded model
        answers = [Answer(sample.shown, sample.answer, *both) for sample, *both in said]
        metrics = read_metrics(output / "metrics.jsonl")
        found[0] = make_report(inputs, adapter, progress, metrics, answers, trainer.args)
        plan = next((part for part in parts.callbacks if isinstance(part, RankPlan)), None)
        write_report(output, recipe, found[0], metrics, plan)
    (report,) = broadcast_object_list(found)
    return report


def _answers(inputs: Inputs, display: Display) -> list[str]:
    with display.phase("answering samples"):
        return answer_samples(inputs)


def _save(trainer: AdapterTrainer, inputs: Inputs, output: Path) -> None:
    """The result of the run: the adapter, or the model as a folder of Transformers."""
    if not isinstance(trainer.adapter, Full):
        trainer.save_model(str(output / ADAPTER))
        return
    state = trainer.gathered()
    if processes().is_main_process:
        save_directory(inputs.model, inputs.processor, output / MODEL, state)


def claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a folder that holds something else; on resume, a run of another recipe."""
    if not resume:
        if output.is_dir() and any(output.iterdir()):
            what = "holds a run already: add --resume to go on with it, or" if _is_run(output) else "is not empty:"
            raise RankfoldError(f"{output} {what} choose another --output")
        return
    if not _is_run(output):
        return
    saved, given = read_recipe(output / "recipe.yaml").model_dump(), recipe.model_dump()
    given["data"]["labels"] = given["data"]["labels"] or saved["data"]["labels"]
    if given["modules_to_save"] is None:
        given["modules_to_save"] = saved["modules_to_save"]
    changed = sorted(key for key in given if given[key] != saved[key] and key not in _FREE_ON_RESUME)
    if changed:
        raise RankfoldError(f"--resume: the run in {output} has another recipe, different in: {', '.join(changed)}")


def _is_run(output: Path) -> bool:
    return (output / "recipe.yaml").exists()


def last_checkpoint(output: Path) -> Path | None:
    folder = output / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(found) if found else None


def attach_adapter(
    inputs: Inputs, parts: Parts, statistics: Calibration | None, checkpoint: Path | None
) -> rankfold.Adapter:
    """What the recipe trains, on its model: new, or as a checkpoint has it."""
    recipe, model = inputs.recipe, inputs.model
    if parts.method is None:
        return Full(model, targets_of(recipe), recipe.modules_to_save or ())
    if checkpoint is not None:
        adapter = rankfold.load(model, checkpoint / ADAPTER, name=recipe.name)
        for _, tensor in adapter.named_tensors():
            # Loaded tensors are views into one file. Matrix products may round differently at other addresses modulo
            # 64, so each gets memory of its own, as it had in the run that is continued.
            tensor.data = tensor.data.clone()
        return adapter
    return rankfold.attach(
        model,
        parts.method,
        targets=targets_of(recipe),
        name=recipe.name,
        init=parts.init,
        fold=recipe.fold,
        seed=recipe.seed,
        overrides=recipe.overrides,
        modules_to_save=recipe.modules_to_save or (),
        calibration=statistics,
    )


def make_trainer(
    inputs: Inputs,
    parts: Parts,
    adapter: rankfold.Adapter,
    output: Path,
    checkpoint: Path | None,
    display: Display,
    kind: Callable[..., AdapterTrainer] = AdapterTrainer,
) -> tuple[AdapterTrainer, Progress, Interrupt]:
    recipe, data = inputs.recipe, inputs.data
    rows_per_step = recipe.batch.size * processes().num_processes * recipe.batch.accumulate
    train, validation = data.train, None
    if any(technique.reads == "validation" for technique in parts.callbacks):
        train, validation = keep_back(data.train, recipe.seed)
    steps = total_steps(recipe.budget, math.ceil(len(train) / rows_per_step))
    progress, interrupt = Progress(recipe.budget, steps), Interrupt()
    watchers = [Metrics(output / "metrics.jsonl", progress), BudgetWatch(progress), interrupt]
    trainer = kind(
        model=inputs.model,
        args=training_arguments(recipe, output / "checkpoints", steps, resumed=checkpoint is not None),
        adapter=adapter,
        task=recipe.task,
        techniques=parts.callbacks,
        optimizer=parts.optimizer,
        per_layer=recipe.optimizer.per_layer,
        schedule=lambda optimizer: make_schedule(recipe.schedule, optimizer, progress),
        state={"progress": progress},
        data_collator=data.collate,
        train_dataset=train,
        eval_dataset=data.held_out,
        validation=validation,
        callbacks=[*watchers, *display.watchers(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, progress, interrupt


def keep_back(rows: Any, seed: int, share: float = 0.1) -> tuple[Any, Any]:
    """The rows to train on, and some that are kept out of the training for techniques that choose by them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise RankfoldError(f"data: {len(rows)} rows are too few to keep some back for validation")
    return Subset(rows, sorted(order[count:])), Subset(rows, sorted(order[:count]))


def run_to_end(
    trainer: AdapterTrainer, progress: Progress, interrupt: Interrupt, checkpoint: Path | None, display: Display
) -> None:
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if progress.share >= 1:  # it was stopped between the last step and the report
            trainer.finish()
            return
    progress.start()
    with interrupt.listening(), display.training():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    progress.stop()
    if interrupt.signal is not None and progress.share < 1:
        raise TrainingInterruptedError(trainer.state.global_step, interrupt.signal)
