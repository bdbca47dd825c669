"""The work of one process, done in this one."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from rankfold.compare.job import Job, Outcome, prepare, read_outcome
from rankfold.compare.plan import make_plan
from rankfold.compare.result import Trial
from rankfold.compare.worker import _train
from rankfold.train.errors import TrainingStoppedError
from tests.compare.conftest import point
from tests.train import tiny


def job(place: Path, kind: str, **changes: Any) -> Job:
    values = tiny.recipe_values(place / "llama", place / "questions.jsonl", budget={"steps": 4}, samples={"count": 0})
    values["method"] = {"name": "lora", "rank": 2}
    extra = {key: changes.pop(key) for key in ("number", "earlier", "text") if key in changes}
    recipe = make_plan({"recipe": {**values, **changes}, "contenders": ["lora"]}).recipe
    return Job(kind=kind, recipe=recipe.model_dump(mode="json"), threads=1, **extra)  # type: ignore[arg-type]


def done(folder: Path, given: Job) -> Outcome:
    prepare(folder, given)
    _train(folder)
    found = read_outcome(folder, given)
    assert found is not None
    return found


def test_a_run_is_measured_and_keeps_its_adapter(place: Path, tmp_path: Path) -> None:
    given = job(place, "run", text={"path": str(place / "text.txt"), "format": "text", "max_length": 64})
    run = done(tmp_path, given).run
    assert run is not None
    assert (run.steps, run.micro_batch, run.seed, run.lr, run.missing) == (4, 4, 0, 0.01, {})
    assert [step for step, _ in run.training] == [1, 2, 3, 4]
    assert run.step_seconds is not None
    assert 0 < run.step_seconds < run.seconds
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["adapter"]


def test_a_trial_keeps_its_curve_and_nothing_else(place: Path, tmp_path: Path) -> None:
    trial = done(tmp_path, job(place, "trial", number=3)).trial
    assert trial is not None
    assert (trial.number, trial.state, trial.lr) == (3, "complete", 0.01)
    assert [one.step for one in trial.curve] == [0, 1, 2, 3, 4]
    assert trial.loss == trial.curve[-1].loss
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


def test_a_hopeless_trial_is_ended(place: Path, tmp_path: Path) -> None:
    curve = tuple(point(step, 5.5 if step < 2 else 0.1) for step in range(5))
    earlier = tuple(Trial(number=i, lr=0.01, state="complete", loss=0.1, curve=curve) for i in range(2))
    trial = done(tmp_path, job(place, "trial", number=2, earlier=earlier, budget={"steps": 20})).trial
    assert trial is not None
    assert trial.state == "pruned"
    assert trial.curve[-1].step == 2


def test_a_probe_says_what_memory_it_took(place: Path, tmp_path: Path) -> None:
    found = done(tmp_path, job(place, "probe", budget={"steps": 2}))
    assert 0 < found.peak_memory < 2**30
    assert (found.run, found.trial) == (None, None)


def test_a_model_trained_in_full_says_what_is_missing(place: Path, tmp_path: Path) -> None:
    given = job(place, "run", method="full", optimizer={"name": "galore", "rank": 4, "lr": 1e-3})
    run = done(tmp_path, given).run
    assert run is not None
    assert run.quality < run.before["loss"]
    assert run.parameters == sum(p.numel() for p in tiny.llama().parameters())
    assert set(run.missing) == {"forgetting", "inference", "layers"}
    assert run.file_bytes > 4 * run.parameters


def test_a_training_that_diverges_stops(place: Path, tmp_path: Path) -> None:
    given = job(place, "trial", optimizer={"name": "sgd", "lr": 1e30, "clip": 0}, budget={"steps": 20})
    prepare(tmp_path, given)
    with pytest.raises(TrainingStoppedError):
        _train(tmp_path)


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_goes_on_from_its_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    whole = done(tmp_path / "whole", job(place, "run")).run
    given = job(place, "run")
    prepare(tmp_path / "cut", given)
    with monkeypatch.context() as patched:
        patched.setattr("rankfold.compare.measure.measure", _killed)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "cut")
    lines = (tmp_path / "cut" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4
    if lost:  # as if it had been killed a moment earlier
        (tmp_path / "cut" / "seen.json").unlink()
    _train(tmp_path / "cut")
    found = read_outcome(tmp_path / "cut", given)
    assert found is not None
    assert found.run is not None
    assert whole is not None
    assert found.run.after == whole.after
    peak, _, steps = json.loads((tmp_path / "cut" / "seen.json").read_text())
    assert (found.peak_memory, found.run.step_seconds) == (peak, statistics.median(steps))
    assert found.run.missing == {"forgetting": "no general text was given (`text`)"}


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt
