"""What is measured of a finished run, beside what its own report says."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rankfold
from rankfold.audit import metrics
from rankfold.audit.forgetting import forgetting
from rankfold.compare.job import Job
from rankfold.compare.result import Forgetting, Inference, Layer, Point, RunResult
from rankfold.core.convert import product
from rankfold.core.linalg import svd_of_product
from rankfold.errors import RankfoldError
from rankfold.train.display import Display
from rankfold.train.encode import fields, packed_blocks
from rankfold.train.inputs import Inputs, load_inputs
from rankfold.train.recipe import Data, Recipe
from rankfold.train.report import Report
from rankfold.train.rows import read_rows
from rankfold.train.watch import read_metrics

_REPEATS = 9  # forward passes whose median counts
_BLOCKS = 24  # of general text: some 3,000 tokens, twice through the model in every run


class Watched(Protocol):
    """What was seen of the training: peak memory in bytes, seconds of each optimiser step."""

    peak: int
    steps: list[float]


def measure(job: Job, run: Path, report: Report, curve: tuple[Point, ...], seen: Watched) -> RunResult:
    """All figures of the run in the folder `run`. The base is loaded afresh, with the saved adapter on it."""
    recipe = Recipe.model_validate(job.recipe)
    saved = run / ("model" if recipe.full else "adapter")
    missing: dict[str, str] = {}
    found: dict[str, Any] = {"forgetting": None, "inference": None, "layers": ()}
    if recipe.full:
        missing = dict.fromkeys(found, "method full leaves no base beside what it trained")
    else:
        inputs = load_inputs(recipe, Display())
        adapter = rankfold.load(inputs.model, saved)
        parts: dict[str, Callable[[], Any]] = {
            "layers": lambda: layers(adapter),
            "forgetting": lambda: forgotten(inputs, adapter.name, job.text),
            "inference": lambda: inference(inputs, adapter.name, missing),
        }
        for name, part in parts.items():
            try:
                found[name] = part()
            except RankfoldError as error:
                missing[name] = str(error)
    logged = read_metrics(run / "metrics.jsonl")
    return RunResult(
        seed=recipe.seed,
        lr=recipe.optimizer.lr,
        quality=report.after.get("accuracy", report.after["loss"]),
        before=report.before,
        after=report.after,
        curve=curve,
        training=tuple((line["step"], line["loss"]) for line in logged if "loss" in line),
        steps=report.steps,
        seconds=report.seconds,
        step_seconds=statistics.median(seen.steps),
        parameters=report.parameters,
        file_bytes=sum(file.stat().st_size for file in saved.rglob("*") if file.is_file()),
        peak_memory=seen.peak,
        micro_batch=recipe.batch.size,
        missing=missing,
        finished=report.finished,
        **found,
    )


@torch.no_grad()
def layers(adapter: rankfold.Adapter) -> tuple[Layer, ...]:
    """The change of each weight; of an expert site, of each expert. Raises where a method's change is no ΔW."""
    found = []
    for site, delta in adapter.deltas.items():
        if delta.form in ("function", "bias"):
            raise RankfoldError(f"{adapter.method.slug} changes {site} by no ΔW")
        B, A, _ = product(delta, None)
        W = delta.W.detach().float()
        for place, pair in enumerate(zip(*(t.reshape(-1, *t.shape[-2:]) for t in (W, B, A)), strict=True)):
            weight, b, a = pair
            _, S, _ = svd_of_product(b, a)
            noise = S.max() * max(weight.shape) * torch.finfo(S.dtype).eps
            norm = float(torch.linalg.vector_norm(S))
            found.append(
                Layer(
                    site=site if W.dim() == 2 else f"{site}[{place}]",
                    rank=int((noise < S).sum()),
                    norm=norm,
                    relative_norm=norm / float(weight.norm()),
                    stable_rank=metrics.stable_rank(S),
                    effective_rank=metrics.effective_rank(S),
                )
            )
    return tuple(found)


def forgotten(inputs: Inputs, name: str, text: dict[str, Any] | None) -> Forgetting:
    """On blocks of the general text."""
    if text is None:
        raise RankfoldError("no general text was given (`text`)")
    if inputs.recipe.task != "causal-lm":
        raise RankfoldError(f"a model for {inputs.recipe.task} continues no text")
    data = Data.model_validate(text)
    rows = read_rows(data, data.path, data.split, "text.path")
    read = fields(data, rows.column_names)["text"]
    texts = [str(read(dict(row))) for row in rows.select(range(min(len(rows), data.limit or len(rows))))]
    blocks = [torch.tensor(block["input_ids"]) for block in packed_blocks(texts, data, inputs.processor)]
    whole = [block for block in blocks if len(block) == data.max_length][:_BLOCKS]
    made = forgetting(inputs.model, name, whole)
    return Forgetting(loss=made.loss, low=made.low, high=made.high, base=made.base)


@torch.no_grad()
def inference(inputs: Inputs, name: str, missing: dict[str, str]) -> Inference:
    """On one batch of held-out rows. Base and adapter take turns, so that a machine's moods hit both.

    Where it cannot be merged, `missing` gets the reason.
    """
    model = inputs.model.eval()
    device = next(model.parameters()).device
    rows = DataLoader(
        inputs.data.held_out,  # type: ignore[arg-type]
        inputs.recipe.batch.eval_size or inputs.recipe.batch.size,
        collate_fn=inputs.data.collate,
    )
    batch = {key: value.to(device) for key, value in next(iter(rows)).items()}
    base: list[float] = []
    unmerged: list[float] = []
    for turn in range(_REPEATS + 1):
        for route, times in ((None, base), (name, unmerged)):
            with rankfold.using(model, route):
                seconds = _seconds(model, batch)
            if turn:  # the first one warms up
                times.append(seconds)
    try:
        with _merged(model, name):
            merged = statistics.median(_seconds(model, batch) for _ in range(_REPEATS))
    except RankfoldError as error:
        merged, missing["merged"] = None, str(error)
    return Inference(base=statistics.median(base), unmerged=statistics.median(unmerged), merged=merged)


@contextlib.contextmanager
def _merged(model: nn.Module, name: str) -> Iterator[None]:
    rankfold.merge(model, name)
    try:
        yield
    finally:
        rankfold.unmerge(model, name)


def _seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    began = perf_counter()
    model(**batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began
