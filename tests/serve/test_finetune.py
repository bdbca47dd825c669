"""A fine-tuning job in the slack of a server: the same training as elsewhere, in turns."""

import contextlib
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rankfold
from rankfold.core.routing import find_state
from rankfold.errors import RankfoldError
from rankfold.serve.finetune import Job
from rankfold.serve.training import BACKWARD
from rankfold.serve.turns import StoppedError, Turns
from rankfold.train.models import Loaded, load_model
from rankfold.train.recipe import Recipe
from rankfold.train.run import train
from tests.train import tiny

BASE = "models/base"
MANY = 1 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    tiny.write_llama(made / "llama")
    tiny.write_questions(made / "questions.jsonl", 20)
    return made


def recipe(place: Path, model: str = BASE, **changes: Any) -> Recipe:
    values = tiny.recipe_values(place / "llama", place / "questions.jsonl")
    values |= {"name": "sums", "method": {"name": "lora", "rank": 4}, "batch": {"size": 2, "accumulate": 2}}
    values |= {"budget": {"steps": 3}, "samples": {"count": 0}, "targets": ["q_proj", "v_proj"]}
    return Recipe.model_validate({**values, "model": model, **changes})


@pytest.fixture
def loaded(place: Path) -> Loaded:
    made = load_model(recipe(place, str(place / "llama")).model, "causal-lm")
    made.model.eval()
    return made


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters", tmp_path / "job"


def prepared(job: Job) -> Job:
    while not (job.ready or job.ended):
        threading.Event().wait(0.01)
    return job


def to_the_end(job: Job, tokens: int = MANY) -> int:
    used = 0
    while not prepared(job).ended:
        used += job.advance(tokens)
    assert job.status == "succeeded", job.describe()
    return used


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("tokens", [MANY, 7])
def test_it_trains_what_rankfold_train_does(
    place: Path, loaded: Loaded, folders: tuple[Path, Path], tmp_path: Path, tokens: int
) -> None:
    """With techniques, penalties, accumulation and rows of different lengths; in any turns."""
    changes = {"callbacks": [{"name": "lora+", "ratio": 4}], "optimizer": {"lr": 0.01, "clip": 0.5}}
    report = train(recipe(place, str(place / "llama"), **changes), tmp_path / "run")
    job = Job(recipe(place, **changes), loaded, BASE, *folders)
    used = to_the_end(job, tokens)
    ours, theirs = weights(folders[0] / "sums"), weights(tmp_path / "run" / "adapter")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
    told = job.describe()
    assert told["trained_tokens"] == report.tokens
    assert told["losses"]["held_out_loss"] == pytest.approx(report.after["loss"], rel=1e-5)
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["held_out_loss"] == pytest.approx(report.before["loss"], rel=1e-5)
    measured = used - (1 + BACKWARD) * report.tokens
    assert measured > 0
    assert measured % sum("held_out_loss" in line for line in lines) == 0  # each time the same held-out tokens


def test_a_turn_uses_what_it_is_given(place: Path, loaded: Loaded, folders: tuple[Path, Path]) -> None:
    job = prepared(Job(recipe(place), loaded, BASE, *folders))
    given = used = 0
    while not job.ended:
        n = random.Random(given).choice([1, 2, 3, 10])
        took = job.advance(n)
        given, used = given + n, used + took
        assert job.ended or took <= n + BACKWARD
        assert job.ended or used - given <= BACKWARD  # over by less than a window at any time


def test_between_turns_the_model_serves_as_if_nothing_were(
    place: Path, loaded: Loaded, folders: tuple[Path, Path]
) -> None:
    model: Any = loaded.model
    ids = torch.arange(5, 17)[None]
    expected = model(input_ids=ids).logits
    rankfold.attach(model, rankfold.LoRA(rank=2), ["o_proj"], name="other")
    rankfold.set_active(model, None)
    job, others = prepared(Job(recipe(place), loaded, BASE, *folders, attention="eager")), random.getstate()
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    turns = 0
    while not job.ended:
        job.advance(40)
        turns += 1
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert model.config._attn_implementation == "sdpa"
        assert find_state(model).active is None  # type: ignore[union-attr]
        assert torch.equal(torch.get_rng_state(), drawn)
        assert random.getstate() == others
        assert not model.training
    assert turns > 5
    assert list(rankfold.adapters(model)) == ["other"]
    rankfold.detach(model)
    loaded_back = rankfold.load(model, folders[0] / "sums")
    assert any(bool(p.any()) for p in loaded_back.parameters())
    assert not torch.allclose(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("how", ["close", "kill"])
def test_stopped_and_gone_on_is_the_same(place: Path, loaded: Loaded, tmp_path: Path, how: str) -> None:
    """To the last bit where all windows are the same, with dropout drawn; to rounding where a step was hurried."""
    method = {"name": "lora", "rank": 4, "dropout": 0.2 if how == "kill" else 0.0}
    often = {"evaluate": {"steps": 100}, "checkpoint": {"steps": 1, "keep": 9}}
    made = recipe(place, budget={"steps": 3}, method=method, batch={"size": 1, "accumulate": 2}, **often)
    found = []
    for stops in (False, True):
        adapters, folder = tmp_path / f"adapters-{stops}", tmp_path / f"job-{stops}"
        adapters.mkdir()
        job = prepared(Job(made, loaded, BASE, adapters, folder))
        if stops:
            first = job.id
            while not (folder / "checkpoints" / "checkpoint-1").is_dir():
                job.advance(1)
            for _ in range(4):
                job.advance(1)
            assert job.status == "running"
            if how == "close":
                job.close()
            else:
                job._turns.stop()  # nothing more is saved
            saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
            assert saved == ["checkpoint-1", "checkpoint-2"][: 2 if how == "close" else 1]
            assert not list(adapters.iterdir())
            assert find_state(loaded.model) is None
            job = prepared(Job(made, loaded, BASE, adapters, folder))
            assert job.id == first
            assert job.status == "queued"
        to_the_end(job, 1)
        assert job.describe()["step"] == 3
        found.append(weights(adapters / "sums"))
    tolerance = 0.0 if how == "kill" else 1e-5
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=tolerance, atol=tolerance)
    again = Job(made, loaded, BASE, adapters, folder)
    assert (again.status, again.advance(10)) == ("succeeded", 0)


def test_the_job_as_openai_has_it(place: Path, loaded: Loaded, folders: tuple[Path, Path]) -> None:
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

    job = Job(recipe(place), loaded, BASE, *folders)
    assert FineTuningJob.model_validate(job.describe()).fine_tuned_model is None
    assert job.advance(5) == 0 or job.status == "running"
    prepared(job).advance(5)
    assert job.status == "running"
    to_the_end(job)
    told = FineTuningJob.model_validate(job.describe())
    assert told.status == "succeeded"
    assert told.fine_tuned_model == "sums"
    assert told.finished_at is not None
    assert told.finished_at >= told.created_at
    events = [FineTuningJobEvent.model_validate(event) for event in job.events()]
    assert [e.data["step"] for e in events if "loss" in e.data] == [3, 2, 1]  # type: ignore[index,operator]
    assert json.loads((folders[1] / "job.json").read_text())["status"] == "succeeded"


def test_cancelled(place: Path, loaded: Loaded, folders: tuple[Path, Path]) -> None:
    job = prepared(Job(recipe(place), loaded, BASE, *folders))
    job.advance(30)
    job.cancel()
    assert job.status == "cancelled"
    assert not job.ended  # its adapter is taken off in its next turn
    assert job.advance(30) == 0
    assert job.ended
    assert find_state(loaded.model) is None
    assert not list(folders[0].iterdir())
    assert Job(recipe(place), loaded, BASE, *folders).status == "cancelled"  # also after a restart


def test_what_fails_says_why_and_leaves_the_model(place: Path, loaded: Loaded, folders: tuple[Path, Path]) -> None:
    job = Job(recipe(place, targets=["no_proj"]), loaded, BASE, *folders)
    prepared(job).advance(5)
    assert job.status == "failed"
    assert "no_proj" in job.describe()["error"]["message"]
    assert find_state(loaded.model) is None
    other = prepared(Job(recipe(place, name="far"), loaded, BASE, folders[0], folders[1] / "2"))
    other.advance(1)
    for parameter in rankfold.adapters(loaded.model)[other.id].parameters():
        parameter.data.fill_(torch.nan)
    while not prepared(other).ended:
        other.advance(MANY)
    assert other.status == "failed"
    assert "NaN" in other.describe()["error"]["message"]
    assert not list(folders[0].iterdir())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "elsewhere"}, "model.path"),
        ({"method": "full", "targets": "everything"}, "method"),
        ({"precision": "bf16"}, "precision"),
        ({"optimizer": {"name": "mezo", "lr": 1e-4, "clip": 0}}, "optimizer.name"),
        ({"optimizer": {"name": "galore", "per_layer": True, "clip": 0}}, "optimizer.per_layer"),
        ({"name": "../out"}, "name"),
        ({"schedule": {"name": "none"}}, "schedule.name"),
    ],
)
def test_recipes_that_no_job_can_do(
    place: Path, loaded: Loaded, folders: tuple[Path, Path], changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(RankfoldError, match=f"^{key}: "):
        Job(recipe(place, **changes), loaded, BASE, *folders)
    assert not folders[1].exists()


def test_names_and_folders_that_are_taken(place: Path, loaded: Loaded, folders: tuple[Path, Path]) -> None:
    (folders[0] / "sums").mkdir()
    with pytest.raises(RankfoldError, match="another name"):
        Job(recipe(place), loaded, BASE, *folders)
    job = prepared(Job(recipe(place, name="other"), loaded, BASE, *folders))
    job.close()
    with pytest.raises(RankfoldError, match="optimizer"):
        Job(recipe(place, name="other", optimizer={"lr": 0.5}), loaded, BASE, *folders)


def test_only_one_of_two_runs_at_a_time() -> None:
    log: list[str] = []

    def job(turns: Turns) -> None:
        turns.begin()
        for i in range(6):
            turns.take()
            log.append(f"job {i}")
            turns.use(2)

    turns = Turns(job, contextlib.nullcontext)
    turns.start()
    used = []
    while not turns.done:
        used.append(turns.give(3) if turns.waiting else None)
        log.append("host")
    told = [n for n in used if n is not None]
    assert sum(told) == 12
    assert told[0] == 2  # one window a turn, though one token is left
    assert "job 0 host job 1 host job 2 host" in " ".join(log)


def test_a_job_is_stopped_where_it_waits() -> None:
    ended = []

    def job(turns: Turns) -> None:
        try:
            turns.begin()
            while True:
                turns.take()
                turns.use(1)
        except StoppedError:
            ended.append(True)

    turns = Turns(job, contextlib.nullcontext)
    turns.start()
    while not turns.waiting:
        pass
    assert turns.give(5) == 1
    turns.stop()
    assert ended
    assert turns.done
    assert turns.give(5) == 0
