"""Fine-tuning jobs as the openai client sees them, and as the command starts them."""

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from rankfold.serve.engine import Limits
from rankfold.serve.finetune import Job
from rankfold.train.models import Loaded
from rankfold.train.recipe import Recipe
from tests.serve.http import Served, served
from tests.train import tiny


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_questions(tmp_path / "questions.jsonl", 20)
    (tmp_path / "adapters").mkdir()
    return tmp_path


@pytest.fixture
def server(place: Path) -> Iterator[Served]:
    with served(place / "adapters", limits=Limits(latency=1e9, step_tokens=64)) as server:
        yield server


def start(server: Served, place: Path, name: str, steps: int) -> Job:
    values = tiny.recipe_values(Path("base"), place / "questions.jsonl")
    values |= {"name": name, "budget": {"steps": steps}, "samples": {"count": 0}, "batch": {"size": 2}}
    recipe = Recipe.model_validate({**values, "method": {"name": "lora", "rank": 2}})
    engine = server.engine
    loaded = Loaded(engine.model, tiny.tokenizer(), ())
    job = Job(recipe, loaded, "base", place / "adapters", place / "jobs" / name, engine.runner.attention)
    engine.train(job).result()
    return job


def test_a_job_is_followed_and_its_adapter_asked(server: Served, place: Path) -> None:
    client = server.client()
    assert client.fine_tuning.jobs.list().data == []
    job = start(server, place, "sums", 2)
    while (seen := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        time.sleep(0.05)
    assert (seen.status, seen.fine_tuned_model, seen.error) == ("succeeded", "sums", None)
    assert seen.trained_tokens == job.describe()["trained_tokens"] > 0
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert [event.data["step"] for event in events] == sorted([e.data["step"] for e in events], reverse=True)
    answer = client.completions.create(model="sums", prompt="1 + 1", max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert "sums" in [model.id for model in client.models.list()]


def test_jobs_by_pages_and_cancelled(server: Served, place: Path) -> None:
    client = server.client()
    jobs = [start(server, place, name, 10_000) for name in ("one", "two")]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == [jobs[1].id, jobs[0].id]
    assert client.fine_tuning.jobs.cancel(jobs[1].id).status == "cancelled"
    client.fine_tuning.jobs.cancel(jobs[0].id)
    while not all(job.ended for job in jobs):
        time.sleep(0.05)
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.fine_tuning.jobs.cancel(jobs[0].id)


def test_jobs_that_there_are_not(server: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().fine_tuning.jobs.retrieve("ftjob-none")
    with pytest.raises(openai.BadRequestError, match="no such item"):
        server.client().fine_tuning.jobs.list(after="ftjob-none")
    assert server.get("/v1/fine_tuning/jobs?limit=0").status_code == 400
