"""An engine that trains an adapter beside its requests: nobody sees it, and then it is served."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.serve import Engine
from rankfold.serve.engine import Limits
from rankfold.serve.finetune import Job
from rankfold.serve.training import BACKWARD
from rankfold.train.models import Loaded
from rankfold.train.recipe import Recipe
from tests.serve.conftest import save_adapter
from tests.train import tiny

PROMPTS = [[40 + i, 7, 90, 3 * i + 5] for i in range(6)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_questions(tmp_path / "questions.jsonl", 20)
    for seed, (name, method) in enumerate({"lora": "lora", "dora": "dora"}.items()):
        save_adapter(tiny.llama().eval(), tmp_path / "adapters" / name, method, seed, rank=4)
    return tmp_path


def recipe(place: Path, **changes: Any) -> Recipe:
    values = tiny.recipe_values(Path("base"), place / "questions.jsonl")
    values |= {"name": "sums", "budget": {"steps": 2}, "samples": {"count": 0}, "batch": {"size": 2}}
    return Recipe.model_validate({**values, "method": {"name": "lora", "rank": 4}, **changes})


def answers(place: Path, with_job: bool) -> tuple[list[list[int]], dict[str, Any], Any]:
    model = tiny.llama().eval()
    with Engine(model, place / "adapters", limits=Limits(step_tokens=24, latency=1e9)) as engine:
        job = None
        steps: list[tuple[int, int]] = []
        if with_job:
            loaded = Loaded(model, tiny.tokenizer(), ())
            job = Job(recipe(place), loaded, "base", place / "adapters", place / "job", engine.runner.attention)
            while not job.ready:
                pass
            engine.train(job)
        requests = []
        for i, prompt in enumerate(PROMPTS):  # one comes in each step
            requests.append(engine.submit(prompt, [None, "lora", "dora"][i % 3], 12))
            before = dict(engine.counts)
            engine.step()
            steps.append(tuple(engine.counts[key] - before[key] for key in ("rows", "trained")))  # type: ignore[arg-type]
        tokens = [request.result() for request in requests]
        while job is not None and not job.ended:
            before = dict(engine.counts)
            engine.step()
            steps.append(tuple(engine.counts[key] - before[key] for key in ("rows", "trained")))  # type: ignore[arg-type]
        if job is not None:
            assert job.status == "succeeded", job.describe()
            assert "sums" in engine.library.names()
            tokens.append(engine.submit(PROMPTS[0], "sums", 12).result())
        assert engine.pool.used == sum(len(e.pages) for e in engine.library.in_pool)
        return tokens, {"steps": steps, "told": None if job is None else job.describe()}, dict(engine.counts)


def test_requests_do_not_see_it_and_its_adapter_is_served(place: Path) -> None:
    alone, _, _ = answers(place, with_job=False)
    beside, seen, counts = answers(place, with_job=True)
    assert beside[:-1] == alone
    assert counts["failed"] == 0
    assert any(rows and trained for rows, trained in seen["steps"])
    assert 0 < counts["trained_beside"] < counts["trained"]  # in the requests' own forwards
    for rows, trained in seen["steps"]:
        assert rows + trained <= 24 + BACKWARD
    assert counts["trained"] > (1 + BACKWARD) * seen["told"]["trained_tokens"] > 0  # and what was measured
    model = tiny.llama().eval()
    rankfold.load(model, place / "adapters" / "sums", "sums")
    wanted = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert beside[-1] == wanted[0, len(PROMPTS[0]) :].tolist()


def test_an_engine_that_is_closed_leaves_a_job_to_go_on_with(place: Path) -> None:
    model = tiny.llama().eval()
    loaded = Loaded(model, tiny.tokenizer(), ())
    where = (loaded, "base", place / "adapters", place / "job")
    with Engine(model, place / "adapters") as engine:
        job = Job(recipe(place, budget={"steps": 50}), *where, engine.runner.attention)
        engine.start()
        engine.train(job)
        while job.describe()["step"] < 1:
            time.sleep(0.02)
            assert not job.ended, job.describe()
    assert job.status == "running"
    assert not rankfold.adapters(model)
    assert model.config._attn_implementation == "sdpa"
    again = Job(recipe(place, budget={"steps": 50}), *where)
    assert (again.id, again.status) in {(job.id, "queued"), (job.id, "validating_files")}
    again.close()
