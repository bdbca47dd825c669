"""A comparison from its plan to its files: `rankfold compare` in Python."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rankfold.compare.contest import Contest
from rankfold.compare.execution import Cluster, Local
from rankfold.compare.page import write_page
from rankfold.compare.plan import Plan, read_plan, recipe_of
from rankfold.compare.result import FIGURES, Comparison
from rankfold.compare.table import as_csv
from rankfold.core.files import write_whole
from rankfold.errors import RankfoldError
from rankfold.train.data import class_names
from rankfold.train.errors import TrainingInterruptedError
from rankfold.train.plan import build_parts
from rankfold.train.recipe import Recipe
from rankfold.train.report import versions
from rankfold.train.rows import read_split

PLAN, ROWS = "compare.yaml", "data/rows.json"


class ComparisonInterruptedError(TrainingInterruptedError):
    """A signal stopped the comparison; the trainings under way have saved a checkpoint."""

    def __init__(self, finished: int, signal: int):
        Exception.__init__(self, f"stopped after {finished} trainings")
        self.step, self.signal = finished, signal


def compare(
    plan: Plan,
    output: str | Path,
    *,
    resume: bool = False,
    jobs: int | None = None,
    ray: str | None = None,
    command: str = "",
    show: Callable[[Contest], Any] = lambda contest: None,
) -> Comparison:
    """Train every contender of the plan with every seed, and write all to the folder `output`:

    | file              | what                                                                              |
    | ----------------- | --------------------------------------------------------------------------------- |
    | `comparison.html` | the report; it opens without a network                                            |
    | `comparison.json` | everything that was found, as `rankfold.compare.result.Comparison`                |
    | `comparison.csv`  | a line for each run                                                               |
    | `compare.yaml`    | the plan with every default spelled out                                           |
    | `data/`           | the rows, cut once for all: to train on, to judge the search by, to judge by      |
    | `runs/`           | a folder for each process: its job, its log, its training run, its outcome        |

    Every training is a process of its own. With `resume`, go on with what was stopped or killed: what has finished is
    not done again. `jobs` run at once (unless given, as many as there are contenders and cores; one on an
    accelerator), each with an equal share of the cores, which a comparison keeps however it is gone on with; with
    `ray`, as many as the cluster at this address has room for, with one core each.

    `show` is called twice a second, and when a contender comes to another part of its work. `command` is only kept.

    Raises:
        RankfoldError: the plan cannot be carried out, or `output` is taken.
        ComparisonInterruptedError: Ctrl-C or SIGTERM.
    """
    output = Path(output)
    recipes = [_checked(plan, place) for place in range(len(plan.contenders))]
    _claim(output, plan, resume)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (1 if torch.accelerator.is_available() else min(cores, len(plan.contenders)))
    cut = _cut(plan, output, threads=1 if ray else max(1, cores // jobs))
    threads = cut["threads"]
    execution = Cluster(ray, threads) if ray else Local(jobs, threads)
    contest = Contest(plan, recipes, output, cut["labels"], threads, execution, show)
    try:
        asyncio.run(_until_stopped(contest))
    finally:
        execution.close()
        show(contest)
    found = _comparison(contest, cut, jobs, command)
    write_whole(output / "comparison.json", found.model_dump_json(indent=1) + "\n")
    write_whole(output / "comparison.csv", as_csv(found))
    write_page(found, output / "comparison.html")
    return found


async def _until_stopped(contest: Contest) -> None:
    loop, going = asyncio.get_running_loop(), asyncio.ensure_future(contest.go())
    got: list[int] = []

    def stop(number: int) -> None:
        got.append(number)
        going.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop, number)
        except (NotImplementedError, ValueError, RuntimeError):  # not the main thread, or an event loop without
            continue
    try:
        await going
    except asyncio.CancelledError:
        if not got:
            raise
        raise ComparisonInterruptedError(contest.finished, got[0]) from None


def _checked(plan: Plan, place: int) -> Recipe:
    """The contender's recipe. Raises for what is wrong in it whatever the model and the data."""
    entry = plan.contenders[place]
    recipe = recipe_of(plan, entry, f"contenders.{place}")
    try:
        build_parts(recipe)
    except RankfoldError as error:
        raise RankfoldError(f"contenders.{place} ({entry.name}): {error}") from None
    return recipe


def _claim(output: Path, plan: Plan, resume: bool) -> None:
    """Refuse a folder that holds something else; on resume, a comparison of another plan. Then write the plan there."""
    there = (output / PLAN).exists()
    if not resume and output.is_dir() and any(output.iterdir()):
        what = "holds a comparison already: add --resume to go on with it, or" if there else "is not empty:"
        raise RankfoldError(f"{output} {what} choose another --output")
    written = plan.model_dump(mode="json")
    if resume and there:
        saved = read_plan(output / PLAN).model_dump(mode="json")
        if changed := sorted(key for key in written if written[key] != saved[key]):
            raise RankfoldError(f"--resume: {output} holds another comparison, different in: {', '.join(changed)}")
        return
    write_whole(output / PLAN, yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120))


def _cut(plan: Plan, output: Path, threads: int) -> dict[str, Any]:
    """Cut the rows once for all runs, into files; a search's validation rows come out of those to train on.

    What else is settled at the start is kept beside them.
    """
    if (output / ROWS).exists():
        return json.loads((output / ROWS).read_text(encoding="utf-8"))
    recipe, search = plan.recipe, plan.search
    train, test = read_split(recipe.data, recipe.seed)
    labels = class_names(recipe.data, train, test) if recipe.task.endswith("classification") else None
    parts = {"train": train, "test": test}
    if search.trials:
        count = max(1, round(search.validation * len(train)))
        if count >= len(train):
            raise RankfoldError(f"search.validation: {len(train)} rows are too few to judge a search by some of them")
        order = np.random.default_rng(search.seed).permutation(len(train))
        parts |= {
            "train": train.select(np.sort(order[count:])),
            "validation": train.select(np.sort(order[:count])),
        }
    for name, part in parts.items():

        def fill(file: Path, part: Any = part) -> None:
            part.to_parquet(file)

        write_whole(output / "data" / f"{name}.parquet", fill)
    rows = {name: len(part) for name, part in parts.items()}
    cut = {"rows": rows, "labels": labels, "threads": threads, "started": _now()}
    write_whole(output / ROWS, json.dumps(cut))
    return cut


def _comparison(contest: Contest, cut: dict[str, Any], jobs: int, command: str) -> Comparison:
    plan = contest.plan
    recipe = plan.recipe
    classes = recipe.task.endswith("classification")
    name = Path(recipe.model.path.removeprefix("package:").removeprefix("cache:")).name
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {contest.threads} threads a process"
    return Comparison(
        title=plan.title or f"{len(plan.contenders)} contenders on {name}",
        command=command,
        model=recipe.model.path,
        data=recipe.data.path,
        task=recipe.task,
        metric="accuracy" if classes else "held-out loss",
        higher_is_better=classes,
        recipe=recipe.model_dump(mode="json"),
        budget=plan.budget.model_dump(exclude_none=True),
        seeds=plan.seeds,
        search=plan.search.model_dump(),
        rows=cut["rows"],
        threads=contest.threads,
        jobs=jobs,
        device=where,
        versions=versions(),
        started=cut["started"],
        finished=_now(),
        contenders=tuple(state.contender() for state in contest.states),
        definitions={figure.title: figure.definition for figure in FIGURES.values()},
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
