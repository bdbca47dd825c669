"""The course of a comparison: each contender is fitted to the budget, searches its rate, and runs with every seed."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.compare.execution import Execution
from rankfold.compare.job import Job, Outcome, has_stepped, last_lines, prepare, read_outcome, shown_step
from rankfold.compare.plan import Entry, Plan
from rankfold.compare.result import Contender, Failure, RunResult, Size, Trial, show_bytes
from rankfold.compare.search import best, next_rate
from rankfold.core.component import component
from rankfold.errors import RankfoldError
from rankfold.train.recipe import FULL, Recipe


class _JobFailedError(Exception):
    """A process ended without what it was for; the message are the last lines it said. `stepped`: not at once."""

    def __init__(self, reason: str, stepped: bool = False):
        super().__init__(reason)
        self.stepped = stepped


@dataclass
class State:
    """How far a contender has come. `recipe` is its own, with its size and the micro-batch that its memory allows."""

    entry: Entry
    recipe: Recipe
    size: Size | None = None
    lr: float | None = None
    doing: str = "waiting"
    folders: list[Path] = field(default_factory=list)  # of the processes that are running now
    trials: list[Trial] = field(default_factory=list)
    runs: dict[int, RunResult] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def shown(self) -> str:
        """What it is doing, for a person."""
        steps = [step for folder in self.folders if (step := shown_step(folder)) is not None]
        return f"{self.doing}, step {max(steps)}" if steps else self.doing

    def contender(self) -> Contender:
        return Contender(
            name=self.entry.name,
            axis=axis_of(self.entry),
            changes=self.entry.changes,
            size=self.size,
            lr=self.lr,
            trials=tuple(self.trials),
            runs=tuple(self.runs[seed] for seed in sorted(self.runs)),
            failures=tuple(self.failures),
        )


def axis_of(entry: Entry) -> str:
    """The folder of the technique that the contender is named after: the first of its changes that has one."""
    for value in entry.changes.values():
        first = value[0] if isinstance(value, list | tuple) and value else value
        slug = first.get("name") if isinstance(first, dict) else first
        if slug == FULL:
            return FULL
        try:
            return component(slug).axis if isinstance(slug, str) else "recipe"
        except RankfoldError:  # an optimiser of torch.optim, the targets
            continue
    return "recipe"


class Contest:
    """All contenders at once, as far as `execution` has room."""

    def __init__(
        self,
        plan: Plan,
        recipes: Sequence[Recipe],
        output: Path,
        labels: Sequence[str] | None,
        threads: int,
        execution: Execution,
        show: Callable[["Contest"], Any],
    ):
        self.plan, self.output, self.threads = plan, output, threads
        self.labels = None if labels is None else list(labels)  # as a job has them that was read from its file
        self.execution, self.show = execution, show
        self.states = [State(entry, recipe) for entry, recipe in zip(plan.contenders, recipes, strict=True)]

    @property
    def finished(self) -> int:
        return sum(len(state.trials) + len(state.runs) for state in self.states)

    async def go(self) -> None:
        """Until every contender has ended. Cancelled, its processes are stopped, so that they can go on."""
        ticking = asyncio.create_task(self._tick())
        try:
            await asyncio.gather(*(self._contend(state) for state in self.states))
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            self.show(self)
            await asyncio.sleep(0.5)

    def _now(self, state: State, doing: str) -> None:
        state.doing = doing
        self.show(self)

    async def _contend(self, state: State) -> None:
        seeds = self.plan.seeds
        try:
            self._fit_parameters(state)
            if self.plan.budget.memory is not None:
                self._now(state, "fitting the batch")
                await self._do(state, "probe", lambda: Job(kind="probe", **self._said(state, 0, probe=True)))
            await self._search(state)
            self._now(state, f"training 0/{len(seeds)}")
            await asyncio.gather(*(self._judge(state, seed) for seed in seeds))
        except (_JobFailedError, RankfoldError) as error:
            state.failures.append(Failure(seed=None, reason=str(error)))
        self._now(state, "finished" if state.runs else "failed")

    def _fit_parameters(self, state: State) -> None:
        """Solve the size for the budget. A size that the contender states itself stays."""
        budget, recipe = self.plan.budget.parameters, state.recipe
        if budget is None or recipe.full:
            return
        from rankfold.compare.budget import sites_of, solve, stated
        from rankfold.train.plan import build_parts

        method = build_parts(recipe).method
        if method is None:
            return
        own = state.entry.changes.get("method")
        sites = sites_of(recipe, self.labels)
        if isinstance(own, dict) and method.size in own:
            state.size = stated(method, sites, budget)
            return
        made, state.size = solve(method, sites, budget)
        if state.size.field is not None:
            hyper = {**recipe.method.hyper, state.size.field: getattr(made, state.size.field)}
            named = type(recipe.method).model_validate({"name": recipe.method.name, **hyper})
            state.recipe = recipe.model_copy(update={"method": named})

    async def _search(self, state: State) -> None:
        search, stated = self.plan.search, state.recipe.optimizer.lr
        while (number := len(state.trials)) < search.trials:
            self._now(state, f"searching {number}/{search.trials}")
            lr, earlier = next_rate(state.trials, stated, search), tuple(state.trials)

            def job(lr: float = lr, number: int = number, earlier: tuple[Trial, ...] = earlier) -> Job:
                said = self._said(state, search.seed, lr=lr, judge="validation")
                return Job(kind="trial", number=number, earlier=earlier, **said)

            try:
                trial = (await self._do(state, f"trial-{number}", job)).trial
            except _JobFailedError as error:
                if not error.stepped:  # no other rate would help
                    raise
                trial = Trial(number=number, lr=lr, state="failed", loss=None, curve=(), reason=str(error))
            if trial is not None:
                state.trials.append(trial)
        found = best(state.trials)
        if search.trials and found is None:
            last = next((trial.reason for trial in reversed(state.trials) if trial.reason), "all were pruned")
            raise _JobFailedError(f"none of the {search.trials} learning rates went through: {last}")
        state.lr = stated if found is None else found.lr

    async def _judge(self, state: State, seed: int) -> None:
        text = None if self.plan.text is None else self.plan.text.model_dump(mode="json")

        def job() -> Job:
            return Job(kind="run", text=text, **self._said(state, seed, lr=state.lr))

        try:
            run = (await self._do(state, f"seed-{seed}", job)).run
        except _JobFailedError as error:
            state.failures.append(Failure(seed=seed, reason=str(error)))
        else:
            if run is not None:
                state.runs[seed] = run
        self._now(state, f"training {len(state.runs) + len(state.failures)}/{len(self.plan.seeds)}")

    async def _do(self, state: State, name: str, job: Callable[[], Job]) -> Outcome:
        """The outcome of a job, from an earlier time or from a process. One that needs more memory than the budget has
        is done again with its batches cut into smaller parts."""
        limit = self.plan.budget.memory
        while True:
            at, wanted = state.recipe.batch.size, job()
            folder = self._folder(state, name if limit is None else f"{name}-by-{at}")
            found = read_outcome(folder, wanted)
            if found is None:
                prepare(folder, wanted)
                state.folders.append(folder)
                try:
                    await self.execution.run(folder)
                finally:
                    state.folders.remove(folder)
                found = read_outcome(folder, wanted)
            if found is None or found.failure is not None:
                reason = last_lines(folder) if found is None else found.failure
                raise _JobFailedError(reason or "its process ended without a word", has_stepped(folder))
            if limit is None or found.peak_memory <= limit:
                return found
            if at == 1:
                need = f"{show_bytes(found.peak_memory)} with a single row at once"
                raise _JobFailedError(f"needs {need}, over the budget of {show_bytes(limit)}")
            if state.recipe.batch.size == at:  # else another run has come to that already
                state.recipe = halved(state.recipe)

    def _folder(self, state: State, name: str) -> Path:
        plain = "".join(c if c.isalnum() or c in "-=." else "_" for c in state.entry.name)
        return self.output / "runs" / f"{self.states.index(state)}-{plain[:60]}" / name

    def _said(
        self, state: State, seed: int, *, lr: float | None = None, judge: str = "test", probe: bool = False
    ) -> dict[str, Any]:
        """What a job is told: threads, and the contender's recipe on the rows that were cut once for all."""
        recipe = state.recipe.model_dump(mode="json")
        data = (self.output / "data").resolve()
        recipe["data"] |= {
            "path": str(data / "train.parquet"),
            "config": None,
            "split": "train",
            "read": {},
            "limit": None,
            "labels": self.labels,
            "held_out": {"path": str(data / f"{judge}.parquet")},
        }
        recipe |= {
            "seed": seed,
            "log": {"steps": 1},
            "samples": {"count": 0},
            "checkpoint": {**recipe["checkpoint"], "keep": 1},
        }
        recipe["optimizer"]["lr"] = lr or recipe["optimizer"]["lr"]
        if self.plan.budget.minutes is not None:
            recipe["budget"] = {"minutes": self.plan.budget.minutes}
        if probe:
            recipe["budget"] = {"steps": 2}
            recipe["data"]["held_out"]["limit"] = 2 * recipe["batch"]["size"]
        return {"recipe": recipe, "threads": self.threads}


def halved(recipe: Recipe) -> Recipe:
    """With batches in parts of half the rows or fewer, and as many rows a step as before."""
    batch = recipe.batch
    rows = batch.size * batch.accumulate
    size = max(size for size in range(1, batch.size // 2 + 1) if rows % size == 0)
    update = {"size": size, "accumulate": rows // size, "eval_size": min(size, batch.eval_size or size)}
    return recipe.model_copy(update={"batch": batch.model_copy(update=update)})
