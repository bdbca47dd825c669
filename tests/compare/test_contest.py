"""The course of a comparison, with processes that answer at once."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rankfold.compare.contest import Contest, halved
from rankfold.compare.job import Job, Outcome
from rankfold.compare.plan import Plan, make_plan
from rankfold.compare.run import ComparisonInterruptedError, _until_stopped
from rankfold.errors import RankfoldError
from rankfold.train.recipe import Batch
from tests.compare.conftest import Answering, contest, died_after_a_step, well


def go(plan: Plan, output: Path, execution: Any) -> Contest:
    made = contest(plan, output, execution)
    asyncio.run(made.go())
    return made


def test_all_train_on_the_same_rows_with_the_same_seeds(plan: Plan, tmp_path: Path) -> None:
    done = Answering(well)
    made = go(plan, tmp_path, done)
    lora, dora = (
        [job.recipe for job in done.jobs if job.recipe["method"]["name"] == name] for name in ("lora", "dora")
    )
    assert [recipe["seed"] for recipe in lora] == [recipe["seed"] for recipe in dora] == [0, 1]
    for one, other in zip(lora, dora, strict=True):
        assert [key for key in one if one[key] != other[key]] == ["method"]
    assert lora[0]["data"]["path"] == str(tmp_path / "data" / "train.parquet")
    assert lora[0]["data"]["held_out"]["path"] == str(tmp_path / "data" / "test.parquet")
    assert [len(state.runs) for state in made.states] == [2, 2]


def test_class_names_are_the_same_in_a_job_and_in_its_file(plan: Plan, tmp_path: Path) -> None:
    made = contest(plan, tmp_path, Answering(well), labels=("no", "yes"))
    asyncio.run(made.go())
    assert [len(state.runs) for state in made.states] == [2, 2]
    assert not any(state.failures for state in made.states)


def test_rates_are_searched_alike_on_other_rows(values: dict[str, Any], tmp_path: Path) -> None:
    values["search"] = {"trials": 5, "spread": 10}
    values["contenders"] = ["lora", {"name": "dora", "method": "dora", "optimizer": {"lr": 0.001}}]
    done = Answering(lambda job: well(job, abs(job.recipe["optimizer"]["lr"] - 0.005)))
    made = go(make_plan(values), tmp_path, done)
    lora, dora = made.states
    assert len(lora.trials) == len(dora.trials) == 5
    rates = [[trial.lr for trial in state.trials] for state in (lora, dora)]
    assert (rates[0][0], rates[1][0]) == (0.01, 0.001)  # the recipe's own comes first
    # What is drawn before results count is the same for both, each around its own.
    assert [rate / 0.01 for rate in rates[0][1:3]] == pytest.approx([rate / 0.001 for rate in rates[1][1:3]])
    assert all(0.1 <= rate / own <= 10 for own, found in zip((0.01, 0.001), rates, strict=True) for rate in found)
    for state in (lora, dora):
        assert state.lr == min(state.trials, key=lambda trial: trial.loss).lr
        assert {run.lr for run in state.runs.values()} == {state.lr}
    for job in done.of("trial"):
        assert job.recipe["data"]["held_out"]["path"].endswith("validation.parquet")
        assert job.recipe["seed"] not in (0, 1)
        assert [trial.number for trial in job.earlier] == list(range(job.number))


def test_a_failed_contender_is_reported_and_the_others_go_on(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora", "dora", "kasa"], "search": {"trials": 3}}

    def answer(job: Job) -> Outcome | None:
        name, seed = job.recipe["method"]["name"], job.recipe["seed"]
        if name == "kasa" or (name == "dora" and seed == 1):
            (tmp_path / "runs" / "1-dora" / "seed-1" / "log.txt").parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / "1-dora" / "seed-1" / "log.txt").write_text("attaching\nout of luck\n")
            return None
        return well(job)

    done = Answering(answer)
    lora, dora, kasa = (state.contender() for state in go(make_plan(values), tmp_path, done).states)
    assert (len(lora.runs), lora.failures) == (2, ())
    assert ([run.seed for run in dora.runs], dora.failed) == ([0], False)
    assert [(failure.seed, failure.reason) for failure in dora.failures] == [(1, "attaching\nout of luck")]
    assert kasa.failed
    assert kasa.failures[0].seed is None
    # It did not come to a step with its first rate: no other would have helped.
    assert len([job for job in done.of("trial") if job.recipe["method"]["name"] == "kasa"]) == 1


def test_a_rate_that_fails_is_a_trial_like_any_other(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora"], "search": {"trials": 3}}

    def answer(job: Job) -> Outcome | None:
        if job.kind == "trial" and job.number == 0:
            died_after_a_step(tmp_path / "runs" / "0-lora" / "trial-0")
            return Outcome(failure="the loss became nan")
        return well(job, loss=float(job.number))

    (state,) = go(make_plan(values), tmp_path, Answering(answer)).states
    assert [(trial.state, trial.reason) for trial in state.trials] == [
        ("failed", "the loss became nan"), ("complete", None), ("complete", None),
    ]  # fmt: skip
    assert state.lr == state.trials[1].lr


def test_what_has_finished_is_not_done_again(values: dict[str, Any], tmp_path: Path) -> None:
    values["search"] = {"trials": 2}
    plan = make_plan(values)
    killed: list[Job] = []

    def until_killed(job: Job) -> Outcome | None:
        killed.append(job)
        if len(killed) > 5:
            raise KeyboardInterrupt
        return well(job, abs(job.recipe["optimizer"]["lr"] - 0.005))

    with pytest.raises(KeyboardInterrupt):
        go(plan, tmp_path, Answering(until_killed))
    again = Answering(lambda job: well(job, abs(job.recipe["optimizer"]["lr"] - 0.005)))
    made = go(plan, tmp_path, again)
    whole = go(plan, tmp_path / "other", Answering(again.answer))
    assert len(again.jobs) == 8 - 5
    assert [state.contender().trials for state in made.states] == [state.contender().trials for state in whole.states]
    untouched = Answering(well)
    go(plan, tmp_path, untouched)
    assert untouched.jobs == []


def test_a_diverged_training_has_finished_and_one_that_died_has_not(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora"]}
    plan = make_plan(values)
    answers = {0: Outcome(failure="the loss became nan"), 1: None}
    go(plan, tmp_path, Answering(lambda job: answers[job.recipe["seed"]]))
    again = Answering(well)
    (state,) = go(plan, tmp_path, again).states
    assert [job.recipe["seed"] for job in again.jobs] == [1]
    assert [(failure.seed, failure.reason) for failure in state.failures] == [(0, "the loss became nan")]


def test_memory_cuts_batches_into_parts_until_they_fit(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora", "dora"], "budget": "memory=250"}
    values["recipe"]["batch"] = {"size": 8}

    def answer(job: Job) -> Outcome:
        wide = 1000 if job.recipe["method"]["name"] == "dora" else 100
        return well(job, peak=wide * job.recipe["batch"]["size"])

    done = Answering(answer)
    lora, dora = go(make_plan(values), tmp_path, done).states
    probed = [job.recipe["batch"] for job in done.of("probe") if job.recipe["method"]["name"] == "lora"]
    assert [(batch["size"], batch["accumulate"]) for batch in probed] == [(8, 1), (4, 2), (2, 4)]
    assert [job.recipe["batch"]["size"] for job in done.of("run")] == [2, 2]
    assert {run.micro_batch for run in lora.runs.values()} == {2}
    assert dora.failures[0].reason == "needs 1 kB with a single row at once, over the budget of 250 B"


def test_a_run_over_the_memory_is_done_again_in_smaller_parts(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora"], "budget": "memory=300", "seeds": 1}
    done = Answering(lambda job: well(job, peak=100 * job.recipe["batch"]["size"] - 100 * (job.kind == "probe")))
    (state,) = go(make_plan(values), tmp_path, done).states
    assert [(job.kind, job.recipe["batch"]["size"]) for job in done.jobs] == [("probe", 4), ("run", 4), ("run", 2)]
    assert state.runs[0].micro_batch == 2
    again = Answering(well)
    assert go(make_plan(values), tmp_path, again).states[0].runs == state.runs
    assert again.jobs == []


@pytest.mark.parametrize(
    ("size", "accumulate", "parts"), [(8, 1, (4, 2)), (6, 1, (3, 2)), (5, 1, (1, 5)), (2, 3, (1, 6))]
)
def test_halving_keeps_the_rows_of_a_step(plan: Plan, size: int, accumulate: int, parts: tuple[int, int]) -> None:
    recipe = plan.recipe.model_copy(update={"batch": Batch(size=size, accumulate=accumulate)})
    batch = halved(recipe).batch
    assert (batch.size, batch.accumulate) == parts


def test_parameters_solve_the_size_and_leave_a_stated_one(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora", "dora", "kasa:rank=1", "lora:rank=3"], "budget": "parameters=3k"}
    done = Answering(well)
    lora, dora, kasa, stated = go(make_plan(values), tmp_path, done).states
    ranks = {job.recipe["method"]["name"]: job.recipe["method"]["rank"] for job in done.jobs[:6]}
    assert lora.size is not None
    assert (lora.size.field, lora.size.value) == ("rank", ranks["lora"])
    for state in (lora, dora):
        assert state.size is not None
        assert 1500 < state.size.parameters <= 3000
    assert kasa.size is not None
    assert (kasa.size.value, ranks["kasa"]) == (1, 1)
    assert stated.recipe.method.hyper["rank"] == 3


def test_minutes_take_the_place_of_the_recipes_budget(values: dict[str, Any], tmp_path: Path) -> None:
    done = Answering(well)
    go(make_plan({**values, "budget": "minutes=2", "search": {"trials": 1}}), tmp_path, done)
    assert {str({k: v for k, v in job.recipe["budget"].items() if v}) for job in done.jobs} == {"{'minutes': 2.0}"}


def test_a_budget_that_cannot_be_met_is_the_contenders_failure(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"contenders": ["lora", "ia3"], "budget": "parameters=700"}
    lora, ia3 = go(make_plan(values), tmp_path, Answering(well)).states
    assert "lora cannot be made to train at most 700 parameters" in lora.failures[0].reason
    assert len(ia3.runs) == 2


def test_a_cluster_that_does_not_see_the_folder_fails_the_contender(plan: Plan, tmp_path: Path) -> None:
    class Blind(Answering):
        async def run(self, folder: Path) -> None:
            raise RankfoldError("--ray: a node of the cluster does not see it")

    states = go(plan, tmp_path, Blind(well)).states
    assert all("does not see it" in state.failures[0].reason for state in states)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_what_is_running(plan: Plan, tmp_path: Path, number: int) -> None:
    class Long(Answering):
        stopped = 0

        async def run(self, folder: Path) -> None:
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.stopped += 1
                raise

    running = Long(well)
    with pytest.raises(ComparisonInterruptedError, match="stopped after 0 trainings") as error:
        asyncio.run(_until_stopped(contest(plan, tmp_path, running)))
    assert (error.value.signal, running.stopped) == (number, 4)
