"""From a recipe's names to things: components, optimiser, training arguments. Wrong names fail before a model loads."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations

import rankfold
from rankfold.core.component import components
from rankfold.errors import RankfoldError
from rankfold.quantizers.halo import HALO
from rankfold.train.recipe import Component, Optimizer, Recipe
from rankfold.train.watch import default_interval


@dataclass(frozen=True)
class Parts:
    """The registered components that a recipe names; no method where the model itself is trained."""

    method: Any | None
    init: Any | None
    callbacks: tuple[Any, ...]
    optimizer: rankfold.Optimizer
    low_precision: Any | None = None


def build_parts(recipe: Recipe) -> Parts:
    """Build the recipe's components. Raises RankfoldError that names the key."""
    return Parts(
        method=None if recipe.full else _build(recipe.method, "method", rankfold.Method),
        init=None if recipe.init is None else _build(recipe.init, "init", rankfold.Init),
        callbacks=tuple(_build(c, f"callbacks.{i}", rankfold.Callback) for i, c in enumerate(recipe.callbacks)),
        optimizer=build_optimizer(recipe.optimizer),
        low_precision=None if recipe.low_precision is None else _build(recipe.low_precision, "low_precision", HALO),
    )


def _build(component: Component, key: str, kind: type) -> Any:
    try:
        built = rankfold.build(component.name, **component.hyper)
    except RankfoldError as error:
        raise RankfoldError(f"{key}: {error}") from None
    if not isinstance(built, kind):
        fitting = ", ".join(cls.slug for cls in components() if issubclass(cls, kind)) or "none"
        what = kind.__name__.lower()
        raise RankfoldError(f"{key}: {component.name} is no {what}; of that kind there are: {fitting}")
    return built


class FromTorch(rankfold.Optimizer):
    """A class of torch.optim, with its arguments."""

    shards = "any"

    kind: Callable[..., torch.optim.Optimizer]
    hyper: dict[str, Any]

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return self.kind(groups, lr=lr, weight_decay=weight_decay, **self.hyper)


def build_optimizer(spec: Optimizer) -> rankfold.Optimizer:
    """The optimiser that `spec` names: a class of torch.optim, in any case, or a registered one by its slug."""
    classes = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    if spec.name.lower() not in classes:
        ours = [cls.slug for cls in components() if issubclass(cls, rankfold.Optimizer)]
        if spec.name in ours:
            return _build(Component(name=spec.name, **spec.hyper), "optimizer", rankfold.Optimizer)
        near = difflib.get_close_matches(spec.name.lower(), [*classes, *ours], n=1)
        there = f"torch.optim has: {', '.join(sorted(classes))}; Rankfold has: {', '.join(ours) or 'none'}"
        hint = f"did you mean {near[0]}?" if near else there
        raise RankfoldError(f"optimizer.name: there is no {spec.name!r}; {hint}")
    cls = classes[spec.name.lower()]
    allowed = set(inspect.signature(cls).parameters) - {"params", "lr", "weight_decay"}
    if unknown := sorted(set(spec.hyper) - allowed):
        has = ", ".join(sorted(allowed))
        raise RankfoldError(f"optimizer.{unknown[0]}: {cls.__name__} has no such argument; it has: {has}")
    made = FromTorch(
        kind=cls,
        hyper={key: tuple(value) if isinstance(value, list) else value for key, value in spec.hyper.items()},
    )
    try:
        made.optimizer([{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}], spec.lr, spec.weight_decay)
    except (TypeError, ValueError) as error:
        raise RankfoldError(f"optimizer: {cls.__name__} refuses its arguments: {error}") from None
    return made


def training_arguments(
    recipe: Recipe, folder: Path, steps: int | None, resumed: bool
) -> transformers.TrainingArguments:
    """What `transformers.Trainer` is told; checkpoints go to `folder`."""
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and recipe.precision == "fp16":
        raise RankfoldError("precision: fp16 needs an accelerator; on a CPU use float32 or bf16")
    if missing := sorted(set(recipe.log.report_to) - set(get_available_reporting_integrations())):
        there = ", ".join(get_available_reporting_integrations()) or "none"
        raise RankfoldError(f"log.report_to: {missing[0]} is unknown or not installed; installed are: {there}")
    count_tokens = recipe.task != "image-classification"
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps if steps is not None else 2**40,  # then time or tokens end the run
        per_device_train_batch_size=recipe.batch.size,
        per_device_eval_batch_size=recipe.batch.eval_size or recipe.batch.size,
        gradient_accumulation_steps=recipe.batch.accumulate,
        learning_rate=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        max_grad_norm=recipe.optimizer.clip,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        **_checkpointing(recipe.gradient_checkpointing),
        seed=recipe.seed,
        logging_steps=recipe.log.steps,
        report_to=list(recipe.log.report_to) or "none",
        eval_strategy="steps",
        eval_steps=recipe.evaluate.steps or default_interval(steps),
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=recipe.checkpoint.steps or default_interval(steps),
        save_total_limit=recipe.checkpoint.keep,
        include_num_input_tokens_seen="non_padding" if count_tokens else "no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def _checkpointing(on: bool) -> dict[str, Any]:
    """The arguments for gradient checkpointing, which Transformers renamed after 5.17."""
    new = "activation_checkpointing" in inspect.signature(transformers.TrainingArguments).parameters
    key = "activation_checkpointing" if new else "gradient_checkpointing"
    return {key: on, f"{key}_kwargs": {"use_reentrant": False} if on else None}
