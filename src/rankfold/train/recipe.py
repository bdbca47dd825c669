"""The recipe: one training run as a validated value, written in YAML (`docs/recipes.md` is the guide to its keys).

Light on purpose: no torch and no transformers, so a recipe can be read, checked and edited anywhere.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rankfold.errors import RankfoldError

Format = Literal["chat", "prompt-completion", "text", "classification", "seq2seq", "image-classification"]
Task = Literal["causal-lm", "seq2seq", "sequence-classification", "image-classification"]

FULL = "full"  # the method that has no delta: the model itself is trained
EVERYTHING = "everything"  # of the model's parameters: what it trains unless `targets` says otherwise

TASK_OF_FORMAT: dict[str, Task] = {
    "chat": "causal-lm",
    "prompt-completion": "causal-lm",
    "text": "causal-lm",
    "seq2seq": "seq2seq",
    "classification": "sequence-classification",
    "image-classification": "image-classification",
}

# What each format reads from a row, and what it may read besides.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": ((), ("messages", "prompt", "completion", "system")),
    "prompt-completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "seq2seq": (("prompt", "completion"), ()),
    "image-classification": (("image", "label"), ()),
}


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """A registered component by slug, with its hyperparameters beside it: `{name: lora, rank: 8}`, or just `lora`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _slug_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Model(Section):
    path: str = Field(description="hub id, directory, .gguf file, package:DISTRIBUTION/PATH, or cache:NAME")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of the frozen weights")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class HeldOut(Section):
    """Rows that are never trained on: a seeded share of the data, or a file (or hub split) of their own."""

    fraction: float = Field(0.1, gt=0, lt=1, description="share of the rows, drawn with the seed")
    path: str | None = Field(None, description="rows of their own, read like `data.path`; `fraction` is not used then")
    split: str | None = Field(None, description="a split of the hub data set; `fraction` is not used then")
    limit: int | None = Field(None, gt=0, description="keep at most this many rows")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.split is not None:
            raise RankfoldError("give a path or a split, not both")
        return self


class Data(Section):
    path: str = Field(description="file, directory, hub id, package:DISTRIBUTION/PATH, or cache:NAME")
    format: Format = Field(description="what a row means")
    columns: dict[str, str] = Field(
        default_factory=dict, description="where each field of the format comes from: a column, or text with {column}s"
    )
    config: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    read: dict[str, Any] = Field(default_factory=dict, description="options of the file reader, as encoding: latin-1")
    limit: int | None = Field(None, gt=0, description="train on at most this many rows")
    max_length: int = Field(512, gt=1, description="tokens a row is cut to; the length of a packed block for text")
    train_on: Literal["assistant", "all"] = Field("assistant", description="chat only: which turns carry the loss")
    labels: tuple[str, ...] | None = Field(None, min_length=2, description="class names in order, else as found")
    image_size: int = Field(224, gt=0, description="side of the square every picture is resized to, in pixels")
    held_out: HeldOut = HeldOut()  # type: ignore[call-arg]

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if "format" not in info.data:  # itself refused; its own error is enough
            return columns
        required, optional = COLUMNS[info.data["format"]]
        unknown = sorted(set(columns) - {*required, *optional})
        if unknown:
            allowed = ", ".join(required + optional)
            raise RankfoldError(f"format {info.data['format']} has no field {unknown[0]!r}; allowed: {allowed}")
        return columns

    def column(self, field: str) -> str:
        """Where `field` of the format comes from; its own name unless the recipe maps it."""
        return self.columns.get(field, field)


class Optimizer(Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(
        "adamw", description="a class of torch.optim in any case, or a slug; other keys are its arguments"
    )
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 leaves it as it is")
    per_layer: bool = Field(False, description="step each layer within the backward pass, and free its gradient")

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Schedule(Section):
    name: str = Field("linear", description="a schedule of transformers: linear, cosine, constant, polynomial, ...")
    warmup: float = Field(0.0, ge=0, description="steps, or a share of the run when below 1")


class Budget(Section):
    """When training ends: at whichever of these comes first."""

    steps: int | None = Field(None, gt=0, description="optimiser steps")
    epochs: float | None = Field(None, gt=0, description="passes over the training rows")
    minutes: float | None = Field(None, gt=0, description="wall-clock time of training")
    tokens: int | None = Field(None, gt=0, description="input tokens, padding not counted")

    @model_validator(mode="after")
    def _some_end(self) -> Self:
        if all(value is None for value in (self.steps, self.epochs, self.minutes, self.tokens)):
            raise RankfoldError("give at least one of steps, epochs, minutes, tokens")
        return self


class Batch(Section):
    size: int = Field(8, gt=0, description="rows per device and forward pass")
    accumulate: int = Field(1, gt=0, description="forward passes per optimiser step")
    eval_size: int | None = Field(None, gt=0, description="rows per device when measuring; `size` unless given")


class Log(Section):
    steps: int = Field(1, gt=0, description="optimiser steps between lines of metrics.jsonl")
    report_to: tuple[str, ...] = Field((), description="trackers of transformers.Trainer: tensorboard, wandb, ...")


class Evaluate(Section):
    steps: int | None = Field(None, gt=0, description="optimiser steps between measurements; else a tenth of the run")


class Checkpoint(Section):
    steps: int | None = Field(None, gt=0, description="optimiser steps between checkpoints; else a tenth of the run")
    keep: int = Field(2, gt=0, description="checkpoints kept; older ones are deleted")


class Samples(Section):
    count: int = Field(3, ge=0, description="held-out rows shown in the report, before and after")
    max_new_tokens: int = Field(64, gt=0, description="length of a generated sample")


class Calibration(Section):
    """What an init that learns from data is shown. The model is run over it in full, in a bounded memory."""

    batches: int = Field(32, gt=0, description="batches of training rows, drawn with the seed")
    size: int = Field(1, gt=0, description="rows a batch; activations take memory with each row")
    memory: float | None = Field(
        None, gt=0, description="GiB of statistics held at once; else a fifth of the model's own size"
    )
    cache: str | None = Field(None, description="folder that keeps the statistics for other runs")


class Recipe(Section):
    """One training run. `read_recipe` reads it from YAML with errors that name the key."""

    model: Model
    data: Data
    method: Component = Field(description="the delta, by slug, with its hyperparameters; or full, for the model itself")
    targets: str | tuple[str, ...] = Field(
        default_factory=lambda given: _targets(given.get("method")),
        description="preset, list of suffixes, or regular expression",
    )
    init: Component | None = Field(None, description="where the delta starts, by slug")
    fold: bool = Field(False, description="fold an init's offset into the base weights while training")
    calibration: Calibration = Calibration()  # type: ignore[call-arg]
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="hyperparameters for the targets that match a pattern"
    )
    modules_to_save: tuple[str, ...] | None = Field(
        None, description="modules trained in full; unless given, those the checkpoint lacks (a new head)"
    )
    callbacks: tuple[Component, ...] = Field((), description="what happens around a step, by slug")
    name: str = Field("default", description="name of the adapter")
    optimizer: Optimizer = Optimizer()  # type: ignore[call-arg]
    schedule: Schedule = Schedule()  # type: ignore[call-arg]
    budget: Budget
    batch: Batch = Batch()  # type: ignore[call-arg]
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="type the forward pass computes in")
    low_precision: Component | None = Field(None, description="how the products of linear layers are rounded, by slug")
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    seed: int = Field(0, ge=0, lt=2**32)
    log: Log = Log()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    checkpoint: Checkpoint = Checkpoint()  # type: ignore[call-arg]
    samples: Samples = Samples()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _full_has_no_delta(self) -> Self:
        if self.method.name != FULL:
            return self
        without = {"init": self.init is not None, "fold": self.fold, "overrides": bool(self.overrides)}
        without |= {f"method.{key}": True for key in self.method.hyper}
        if given := [key for key, present in without.items() if present]:
            raise RankfoldError(
                f"{given[0]}: method full trains the model itself and has no delta that this could mean"
            )
        if self.model.dtype == "float16":
            raise RankfoldError("model.dtype: float16 weights cannot be trained; take float32 or bfloat16")
        return self

    @property
    def full(self) -> bool:
        """Whether the model itself is trained, and no adapter."""
        return self.method.name == FULL

    @property
    def task(self) -> Task:
        return TASK_OF_FORMAT[self.data.format]


def _targets(method: Component | None) -> str:
    return EVERYTHING if method is not None and method.name == FULL else "all-linear"
