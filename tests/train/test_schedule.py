"""Budgets and schedules, without a model."""

import pytest
import torch

from rankfold.errors import RankfoldError
from rankfold.train import schedule as module
from rankfold.train.recipe import Budget, Schedule
from rankfold.train.schedule import Progress, make_schedule, total_steps


def rates(schedule: Schedule, progress: Progress, advance: list[int], field: str = "step") -> list[float]:
    """The learning rate at each value of a field of the progress, from a base rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = make_schedule(schedule, optimizer, progress)
    found = []
    for value in advance:
        setattr(progress, field, value)
        optimizer.step()
        made.step()
        found.append(made.get_last_lr()[0])
    return found


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2}, 20),
        ({"epochs": 0.01}, 1),
        ({"epochs": 2, "steps": 5}, 5),
        ({"epochs": 0.3, "steps": 5}, 3),
        ({"minutes": 1}, None),
    ],
)
def test_total_steps(budget: dict[str, float], steps: int | None) -> None:
    assert total_steps(Budget(**budget), steps_per_epoch=10) == steps


def test_a_schedule_over_steps() -> None:
    progress = Progress(Budget(steps=4), 4)
    assert rates(Schedule(name="linear"), progress, [1, 2, 3, 4]) == [0.75, 0.5, 0.25, 0.0]
    assert rates(Schedule(name="linear", warmup=0.5), Progress(Budget(steps=4), 4), [1, 2, 3]) == [0.5, 1.0, 0.5]
    assert rates(Schedule(name="constant"), Progress(Budget(steps=4), 4), [1, 2]) == [1.0, 1.0]


def test_a_schedule_over_tokens_follows_the_tokens() -> None:
    progress = Progress(Budget(tokens=1000), None)
    assert rates(Schedule(name="linear"), progress, [100, 150, 900, 1000], "tokens") == [
        0.9,
        0.85,
        pytest.approx(0.1),
        0.0,
    ]


def test_a_schedule_over_time_follows_the_clock() -> None:
    progress = Progress(Budget(minutes=1), None)
    progress.resume({"step": 3, "tokens": 5, "seconds": 15})
    assert progress.share == 0.25
    assert rates(Schedule(name="linear"), progress, [30, 60], "elapsed") == [0.5, 0.0]


def test_the_part_nearest_its_end_counts() -> None:
    progress = Progress(Budget(steps=10, tokens=100), 10, step=2, tokens=90)
    assert progress.share == 0.9
    progress.tokens = 200
    assert progress.share == 1.0


def test_time_adds_up_over_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0])
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    progress = Progress(Budget(steps=1), 1)
    progress.resume({"step": 0, "tokens": 0, "seconds": 7})
    progress.start()
    progress.stop()
    assert progress.seconds == 12.0


@pytest.mark.parametrize(
    ("schedule", "budget", "message"),
    [
        (Schedule(name="reduce_lr_on_plateau"), Budget(steps=3), "schedule.name: there is no 'reduce_lr_on_plateau'"),
        (Schedule(name="warmup_stable_decay"), Budget(steps=3), "schedule.name: there is no 'warmup_stable_decay'"),
        (Schedule(name="nope"), Budget(steps=3), "schedule.name: there is no 'nope'"),
        (Schedule(warmup=5), Budget(minutes=3), "schedule.warmup: steps need a budget in steps or epochs"),
    ],
)
def test_schedules_that_cannot_run(schedule: Schedule, budget: Budget, message: str) -> None:
    with pytest.raises(RankfoldError, match=message):
        module.check_schedule(schedule, budget)
