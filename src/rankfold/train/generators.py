"""Training a network that generates adapters: `rankfold train-generator` in Python."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import set_seed
from transformers.modeling_outputs import CausalLMOutput

import rankfold
from rankfold.compose._sources import Source, open_source
from rankfold.compose.generative_adapter import GenerativeAdapter
from rankfold.compose.generator import Generator, save_generator
from rankfold.compose.icm_lora import ICMLoRA, examples, task_vector
from rankfold.core.files import write_whole
from rankfold.errors import RankfoldError
from rankfold.train.data import Prepared, prepare
from rankfold.train.display import Display
from rankfold.train.full import Full
from rankfold.train.inputs import Inputs
from rankfold.train.models import load_model
from rankfold.train.places import locate
from rankfold.train.plan import Parts, build_optimizer
from rankfold.train.plot import loss_curve
from rankfold.train.processes import processes
from rankfold.train.recipe import (
    Batch,
    Budget,
    Checkpoint,
    Component,
    Data,
    Evaluate,
    Log,
    Model,
    Optimizer,
    Samples,
    Schedule,
    Section,
    Task,
)
from rankfold.train.recipe_file import read_recipe, write_recipe
from rankfold.train.report import versions
from rankfold.train.rows import read_split
from rankfold.train.run import last_checkpoint, make_trainer, run_to_end
from rankfold.train.schedule import check_schedule
from rankfold.train.watch import read_metrics, rewind_metrics

GENERATOR = "generator"  # the folder of a run that holds what was trained
_FREE_ON_RESUME = {"budget", "log", "evaluate", "checkpoint"}


class Zoo(Section):
    """The adapters that were trained for one task, and texts that show what the task is."""

    adapters: tuple[str, ...] = Field(
        min_length=1, description="folders of adapters; of a run, its adapter and those of its checkpoints"
    )
    examples: str = Field(description="a text file of examples, with an empty line between two")


class GeneratorRecipe(Section):
    """One training of a generator. What it learns from is `data`, texts, or `tasks`, adapters, as it needs."""

    generator: Component = Field(description="generative-adapter or icm-lora, with its hyperparameters")
    model: Model = Field(description="the base model, which stays as it is")
    data: Data | None = Field(None, description="for generative-adapter: texts; max_length is that of several chunks")
    tasks: dict[str, Zoo] | None = Field(None, description="for icm-lora: the adapters and examples of each task")
    held_out: float = Field(0.1, gt=0, lt=1, description="for icm-lora: share of each task's adapters held out")
    targets: str | tuple[str, ...] = Field(("o_proj",), description="for generative-adapter: the layers it adapts")
    optimizer: Optimizer = Optimizer(lr=1e-4)  # type: ignore[call-arg]
    schedule: Schedule = Schedule()  # type: ignore[call-arg]
    budget: Budget
    batch: Batch = Batch()  # type: ignore[call-arg]
    precision: str = Field("float32", pattern="^(float32|bf16|fp16)$", description="type the forward pass computes in")
    seed: int = Field(0, ge=0, lt=2**32)
    log: Log = Log()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    checkpoint: Checkpoint = Checkpoint()  # type: ignore[call-arg]

    gradient_checkpointing: ClassVar[bool] = False  # a second forward pass would not find the states of the first
    samples: ClassVar[Samples] = Samples(count=0)  # type: ignore[call-arg]
    task: ClassVar[Task] = "causal-lm"

    @model_validator(mode="after")
    def _what_it_learns_from(self) -> Self:
        wants = {"generative-adapter": "data", "icm-lora": "tasks"}.get(self.generator.name)
        if wants is None:
            raise RankfoldError(
                f"generator: {self.generator.name!r} generates no adapters; generative-adapter and icm-lora do"
            )
        for key in ("data", "tasks"):
            if (getattr(self, key) is None) == (key == wants):
                raise RankfoldError(f"{key}: {self.generator.name} {'needs' if key == wants else 'has no use for'} it")
        if self.data is not None and self.data.format != "text":
            raise RankfoldError("data.format: a generator reads running text, format text")
        return self


@dataclass(frozen=True)
class GeneratorReport:
    """The figures of a finished run, as `report.json` holds them. `before` and `after` are held-out losses.

    `read` says of each task what its adapters lost at most in a layer, relatively, as they were seen as LoRAs.
    """

    before: float
    after: float
    steps: int
    seconds: float
    parameters: int
    train_rows: int
    held_out_rows: int
    seed: int
    versions: dict[str, str]
    read: dict[str, float]


class Training(nn.Module):
    """A generator and the frozen base that it reads with, as one model that gives a loss."""

    accepts_loss_kwargs = False

    def __init__(self, generator: Generator, base: Any):
        super().__init__()
        self.generator: Any = generator
        self.base, self.config = base, base.config
        self.main_input_name = "input_ids" if isinstance(generator.config, GenerativeAdapter) else "labels"

    def forward(self, labels: Tensor, input_ids: Any = None, attention_mask: Any = None, condition: Any = None) -> Any:
        """Text in chunks (b, n, T), which are their own labels; or flat adapters `labels` (b, P) and their tasks'
        vectors (b, |c|)."""
        given = (input_ids, attention_mask) if condition is None else (labels, condition)
        return CausalLMOutput(loss=self.generator.loss(self.base, *given))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.base.eval()
        return self


def train_generator(
    recipe: GeneratorRecipe, output: str | Path, *, resume: bool = False, display: Display | None = None
) -> GeneratorReport:
    """Train a generator as `recipe` says, and write all to the folder `output`:

    | file            | what                                                             |
    | --------------- | ---------------------------------------------------------------- |
    | `generator/`    | the trained generator, for `rankfold.compose.load_generator`     |
    | `report.json`   | held-out loss before and after, steps, sizes, times              |
    | `loss.png`      | training and held-out loss                                       |
    | `metrics.jsonl` | one line per logged step                                         |
    | `recipe.yaml`   | the recipe with every default spelled out                        |
    | `checkpoints/`  | what `resume` goes on from, to the same numbers as without a stop |

    The generative adapter's loss before is that of the base model, since it starts at no change.
    """
    output, main = Path(output), processes().is_main_process
    display = display if display is not None and main else Display()
    config = _component(recipe.generator)
    optimizer = build_optimizer(recipe.optimizer)
    check_schedule(recipe.schedule, recipe.budget)
    if main:
        _claim(output, recipe, resume)
    processes().wait_for_everyone()
    checkpoint = last_checkpoint(output) if resume else None

    set_seed(recipe.seed)
    with display.phase("loading the model"), processes().main_process_first():
        loaded = load_model(recipe.model, "causal-lm", seed=recipe.seed)
    base, tokenizer = loaded.model.requires_grad_(False), loaded.processor
    read: dict[str, float] = {}
    if isinstance(config, GenerativeAdapter):
        generator: Generator = config.for_model(base, recipe.targets)
        with display.phase("reading the data"), processes().main_process_first():
            data = _chunks(recipe, config.chunk, tokenizer)
    else:
        with display.phase("reading the adapters"):
            generator, data, read = _zoo(recipe, config, base, tokenizer)
    if main:
        write_whole(output / "recipe.yaml", write_recipe(recipe))
        rewind_metrics(output / "metrics.jsonl", -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
    model = Training(generator.start(recipe.seed), base)
    full = Full(model, [GENERATOR])
    inputs = Inputs(recipe, model, tokenizer, data)  # type: ignore[arg-type]  # the keys that a trainer asks for are there
    parts = Parts(method=None, init=None, callbacks=(), optimizer=optimizer)
    trainer, progress, interrupt = make_trainer(inputs, parts, full, output, checkpoint, display)
    if checkpoint is not None:
        full.restore(checkpoint / trainer.part)
    run_to_end(trainer, progress, interrupt, checkpoint, display)
    metrics = read_metrics(output / "metrics.jsonl")
    measured = [line["held_out_loss"] for line in metrics if "held_out_loss" in line]
    report = GeneratorReport(
        before=measured[0],
        after=measured[-1],
        steps=progress.step,
        seconds=round(progress.seconds, 3),
        parameters=full.num_parameters(),
        train_rows=len(data.train),
        held_out_rows=len(data.held_out),
        seed=recipe.seed,
        versions=versions(),
        read=read,
    )
    if main:
        save_generator(generator, output / GENERATOR)
        write_whole(output / "report.json", json.dumps(asdict(report), indent=2) + "\n")
        write_whole(output / "loss.png", loss_curve(metrics, f"{config.slug} for {Path(recipe.model.path).name}"))
    return report


def _component(described: Component) -> GenerativeAdapter | ICMLoRA:
    try:
        return rankfold.build(described.name, **described.hyper)
    except RankfoldError as error:
        raise RankfoldError(f"generator: {error}") from None


def _claim(output: Path, recipe: GeneratorRecipe, resume: bool) -> None:
    """Refuse a folder that holds something else; on resume, a run of another recipe."""
    there = output / "recipe.yaml"
    if not resume:
        if output.is_dir() and any(output.iterdir()):
            what = "holds a run already: add --resume to go on with it, or" if there.exists() else "is not empty:"
            raise RankfoldError(f"{output} {what} choose another --output")
    elif there.exists():
        saved, given = read_recipe(there, schema=GeneratorRecipe).model_dump(), recipe.model_dump()
        if changed := sorted(key for key in given if given[key] != saved[key] and key not in _FREE_ON_RESUME):
            raise RankfoldError(f"--resume: the run in {output} has another recipe, different in: {', '.join(changed)}")


def _chunks(recipe: GeneratorRecipe, chunk: int, tokenizer: Any) -> Prepared:
    """Texts as rows of whole chunks; a batch is (b, n, chunk)."""
    assert recipe.data is not None
    length = recipe.data.max_length
    if length % chunk or length < 2 * chunk:
        raise RankfoldError(
            f"data.max_length: {length} tokens are not two or more whole chunks of {chunk} (generator.chunk)"
        )
    made = prepare(recipe, read_split(recipe.data, recipe.seed), tokenizer, None)  # type: ignore[arg-type]
    parts = [
        part.filter(lambda ids: len(ids) == length, input_columns="input_ids") for part in (made.train, made.held_out)
    ]
    for part, key in zip(parts, ("data.path", "data.held_out"), strict=True):
        if len(part) == 0:
            raise RankfoldError(f"{key}: the text is shorter than data.max_length, {length} tokens")

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows]).unflatten(-1, (-1, chunk))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return Prepared(*parts, collate, (), made.dropped)  # type: ignore[arg-type]


def _zoo(
    recipe: GeneratorRecipe, config: ICMLoRA, base: Any, tokenizer: Any
) -> tuple[Generator, Prepared, dict[str, float]]:
    """The generator, and rows of one adapter each; of every task some are held out. What is no product (DoRA, ...) is
    read as the best one of its method's rank; what that loses at most is said by task."""
    assert recipe.tasks is not None
    base.to(processes().device)
    zoo, vectors, read = {}, {}, {}
    for task, given in recipe.tasks.items():
        folders = [folder for place in given.adapters for folder in _adapters(place, f"tasks.{task}.adapters")]
        if len(folders) < 2:
            raise RankfoldError(f"tasks.{task}.adapters: one is held out, so that two or more are needed")
        sources = [open_source(folder, base) for folder in folders]
        for source in sources:
            if trouble := source.doubt or sources[0].alike(source):
                raise RankfoldError(f"tasks.{task}.adapters: {trouble}")
        seen = [{site: _as_product(source, site) for site in source.sites} for source in sources]
        read[task] = max(error for adapter in seen for _, _, error in adapter.values())
        zoo[task] = [{site: (B, A) for site, (B, A, _) in adapter.items()} for adapter in seen]
        path = locate(given.examples, f"tasks.{task}.examples")
        if path is None or not path.is_file():
            raise RankfoldError(f"tasks.{task}.examples: there is no file {given.examples}")
        texts = examples(path.read_text("utf-8", errors="replace"))
        vectors[task] = task_vector(base, tokenizer, texts, config.samples).cpu()
    vae = config.for_zoo(base, zoo, vectors)
    train, held_out = [], []
    for number, (task, samples) in enumerate(zoo.items()):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        count = min(max(1, round(recipe.held_out * len(samples))), len(samples) - 1)
        for place, i in enumerate(order):
            x = vae.layout.standardise(vae.flatten(samples[i]), vae.statistics[number])
            (held_out if place < count else train).append({"labels": x, "condition": vectors[task]})

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("labels", "condition")}
        return {**batch, "attention_mask": torch.ones(len(rows), 1)}  # what a trainer counts as tokens: adapters here

    return vae, Prepared(train, held_out, collate, (), 0), read  # type: ignore[arg-type]


def _as_product(source: Source, site: str) -> tuple[Tensor, Tensor, float]:
    """B, A and the relative error of them: exact for factors, else of the rank that the method says."""
    factors = source.delta(site).form == "factors"
    return source.pair(site, None if factors else getattr(source.methods[site], "rank", None))


def _adapters(place: str, key: str) -> list[Path]:
    """The adapter at a place; of a run, those of its checkpoints and the last."""
    folder = locate(place, key)
    if folder is None or not folder.is_dir():
        raise RankfoldError(f"{key}: there is no folder {place}")
    inner = [*folder.glob("checkpoints/checkpoint-*/adapter"), folder / "adapter"]
    found = [path for path in inner if (path / "adapter.safetensors").is_file()]
    return sorted(found) or [folder]
