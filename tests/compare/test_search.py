"""The search of a learning rate: its rates, its pruning, its choice."""

import math

import pytest

from rankfold.compare.plan import Search
from rankfold.compare.result import Point, Trial
from rankfold.compare.search import best, is_hopeless, next_rate

SEARCH = Search(trials=8, spread=10.0)


def trial(number: int, lr: float, losses: list[float], state: str = "complete") -> Trial:
    curve = tuple(Point(step=10 * i, seconds=0, loss=loss) for i, loss in enumerate(losses))
    return Trial(number=number, lr=lr, state=state, loss=losses[-1], curve=curve)  # type: ignore[arg-type]


def searched(optimum: float) -> list[float]:
    """The rates of a whole search where the loss is the distance to an optimum in powers of ten."""
    trials: list[Trial] = []
    for number in range(SEARCH.trials):
        lr = next_rate(trials, 1e-2, SEARCH)
        trials.append(trial(number, lr, [3.0, abs(math.log10(lr / optimum))]))
    return [one.lr for one in trials]


def test_the_recipes_rate_comes_first_and_all_lie_around_it() -> None:
    rates = searched(1e-2)
    assert rates[0] == 1e-2
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == len(rates)


def test_the_same_search_gives_the_same_rates_and_other_results_others() -> None:
    assert searched(2e-3) == searched(2e-3)
    assert searched(2e-3)[:3] == searched(8e-2)[:3]
    assert searched(2e-3)[3:] != searched(8e-2)[3:]


def test_later_rates_follow_what_was_good() -> None:
    low, high = searched(1e-3), searched(1e-1)
    assert sum(map(math.log, low[3:])) < sum(map(math.log, high[3:]))


@pytest.mark.parametrize(
    ("seen", "hopeless"),
    [
        ([5.0, 4.0], True),  # the median of 1, 2 and 3 after 10 steps is 2
        ([5.0, 2.1], True),
        ([5.0, 1.9], False),
        ([5.0, 1.9, 1.4], False),  # after 20 steps it is 1.5
        ([5.0, 1.9, 1.6], True),
    ],
)
def test_a_trial_worse_than_the_median_is_hopeless(seen: list[float], hopeless: bool) -> None:
    earlier = [trial(0, 1e-2, [5, 1, 0.5]), trial(1, 2e-2, [5, 2, 1.5]), trial(2, 3e-2, [5, 3, 2.5])]
    curve = [Point(step=10 * i, seconds=0, loss=loss) for i, loss in enumerate(seen)][1:]
    assert is_hopeless(earlier, curve) is hopeless


def test_the_first_two_are_never_pruned() -> None:
    worst = [Point(step=10, seconds=0, loss=99.0)]
    assert not is_hopeless([], worst)
    assert not is_hopeless([trial(0, 1e-2, [5, 1])], worst)
    assert is_hopeless([trial(0, 1e-2, [5, 1]), trial(1, 1e-2, [5, 1])], worst)


def test_the_best_is_the_lowest_that_went_to_the_end() -> None:
    ended, pruned = trial(0, 1e-2, [5, 1]), trial(1, 2e-2, [5, 0.5], "pruned")
    failed = Trial(number=2, lr=3e-2, state="failed", loss=None, curve=())
    assert best([pruned, failed, trial(3, 4e-2, [5, 2]), ended]) is ended
    assert best([pruned, failed]) is None
    assert best([]) is None
