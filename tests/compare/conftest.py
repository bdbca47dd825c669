"""A tiny model, its data and a plan, and an execution that answers at once instead of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankfold.compare.contest import Contest
from rankfold.compare.job import OUTCOME, RUN, Job, Outcome, read_job
from rankfold.compare.plan import Plan, make_plan
from rankfold.compare.result import Point, RunResult, Trial
from rankfold.core.files import write_whole
from tests.train import tiny


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compared")
    tiny.write_llama(place / "llama")
    tiny.write_questions(place / "questions.jsonl")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return place


@pytest.fixture
def values(place: Path) -> dict[str, Any]:
    """A plan as YAML has it, without a search."""
    recipe = tiny.recipe_values(place / "llama", place / "questions.jsonl", budget={"steps": 4})
    recipe["method"] = {"name": "lora", "rank": 2}
    return {"recipe": recipe, "contenders": ["lora", "dora:rank=2"], "seeds": 2, "search": {"trials": 0}}


@pytest.fixture
def plan(values: dict[str, Any]) -> Plan:
    return make_plan(values)


def point(step: int, loss: float) -> Point:
    return Point(step=step, seconds=float(step), loss=loss)


def result(job: Job, loss: float = 1.0, **changes: Any) -> RunResult:
    """What a run might have come to."""
    given: dict[str, Any] = {
        "seed": job.recipe["seed"],
        "lr": job.recipe["optimizer"]["lr"],
        "quality": loss,
        "before": {"loss": 2.0, "count": 10.0},
        "after": {"loss": loss, "count": 10.0},
        "curve": (point(0, 2.0), point(4, loss)),
        "training": ((1, 2.0), (2, 1.5)),
        "steps": 4,
        "seconds": 2.0,
        "step_seconds": 0.5,
        "parameters": 1000,
        "file_bytes": 5000,
        "peak_memory": 10**6,
        "micro_batch": job.recipe["batch"]["size"],
        "forgetting": None,
        "inference": None,
        "layers": (),
        "missing": {"forgetting": "no general text was given (`text`)"},
        "finished": "2026-01-01T00:00:00+00:00",
    }
    return RunResult.model_validate({**given, **changes})


class Answering:
    """Answers every job by `answer`: an outcome, or None for a process that died; keeps the jobs that it was given."""

    def __init__(self, answer: Callable[[Job], Outcome | None]):
        self.answer = answer
        self.jobs: list[Job] = []

    async def run(self, folder: Path) -> None:
        job = read_job(folder)
        assert job is not None
        self.jobs.append(job)
        outcome = self.answer(job)
        if outcome is not None:
            write_whole(folder / OUTCOME, outcome.model_dump_json())

    def close(self) -> None: ...

    def of(self, kind: str) -> list[Job]:
        return [job for job in self.jobs if job.kind == kind]


def well(job: Job, loss: float = 1.0, peak: int = 0) -> Outcome:
    """An outcome of whatever kind the job is."""
    if job.kind == "trial":
        lr = job.recipe["optimizer"]["lr"]
        curve = (point(0, 2.0), point(4, loss))
        trial = Trial(number=job.number, lr=lr, state="complete", loss=loss, curve=curve)
        return Outcome(peak_memory=peak, trial=trial)
    return Outcome(peak_memory=peak, run=result(job, loss) if job.kind == "run" else None)


def died_after_a_step(folder: Path) -> None:
    write_whole(folder / RUN / "metrics.jsonl", json.dumps({"step": 1, "loss": 9.9}) + "\n")


def contest(plan: Plan, output: Path, execution: Any, labels: Any = None) -> Contest:
    from rankfold.compare.plan import recipe_of

    recipes = [recipe_of(plan, entry, "plan") for entry in plan.contenders]
    return Contest(plan, recipes, output, labels, 1, execution, lambda contest: None)
