"""Residency and prediction: the budget, who leaves first, and rows that sum to 1."""

import random
from collections import OrderedDict

import pytest

from rankfold.errors import RankfoldError
from rankfold.serve.paging import Residency, Transitions


def filled(policy: str, **options: object) -> Residency[str]:
    """a, b, c came in this order; a was used three times, b once, c twice; last of all a, before it b."""
    keys: Residency[str] = Residency(3, policy, **options)  # type: ignore[arg-type]
    for key in "abc":
        assert keys.need(key) == []
    for key in "acacba":
        keys.touch(key)
    return keys


def test_who_leaves_first() -> None:
    assert filled("fifo").need("d") == ["a"]
    assert filled("lru").need("d") == ["c"]
    assert filled("frequency").need("d") == ["b"]


def test_what_was_never_used_leaves_first_and_uses_outlive_a_stay() -> None:
    keys = filled("frequency")
    keys.need("d")
    assert keys.need("e") == ["d"]
    for _ in range(2):
        keys.touch("b")  # out, and used
    assert keys.need("b") == ["e"]
    assert keys.need("f") == ["c"]  # 2 uses, b has 3


def test_of_equals_the_layer_that_ran_last_leaves_first() -> None:
    """Three layers, each used every turn: at layer 1 the next are 2, 0, 1. A rare one waits longer than a lap."""
    now = 1
    keys: Residency[tuple[int, int]] = Residency(3, turns=lambda key: ((key[0] - now - 1) % 3 + 1, 3))
    for layer in (2, 0, 1):
        keys.need((layer, 0))
    for _ in range(4):
        for layer in (0, 1, 2):
            keys.touch((layer, 0))
    assert keys.frequency((1, 0)) == pytest.approx(1 / 3, rel=1e-3)
    assert keys.need((0, 1)) == [(1, 0)]
    for _ in range(4):
        keys.touch((0, 1))  # 4 uses of 16, and 4 of 16 for (2, 0): its turn is the nearer one
    assert keys.need((1, 0)) == [(0, 0)]
    for _ in range(9):
        keys.touch((0, 1))  # now (2, 0) is so rare that its nearness does not help
    assert keys.need((1, 1)) == [(1, 0)]
    assert keys.need((1, 2)) == [(1, 1)]
    keys.touch((1, 2))
    assert keys.need((0, 0)) == [(1, 2)]


def test_sizes_and_pins() -> None:
    keys: Residency[str] = Residency(10, "lru")
    assert keys.need("big", 6) == []
    assert keys.need("small", 3) == []
    keys.touch("big")
    keys.touch("small")
    assert keys.need("more", 4) == ["big"]
    assert keys.used == 7
    keys.pin("small")
    assert keys.need("huge", 8) is None
    assert keys.used == 7
    assert "more" in keys
    assert keys.need("huge", 7) == ["more"]
    keys.pin("small")
    keys.unpin("small")
    with pytest.raises(RankfoldError, match="pinned"):
        keys.remove("small")
    keys.unpin("small")
    keys.remove("small")
    keys.remove("small")
    assert (keys.used, len(keys)) == (7, 1)
    assert keys.need("whole", 11) is None
    for wrong in (lambda: keys.pin("small"), lambda: keys.unpin("huge")):
        with pytest.raises(RankfoldError):
            wrong()


def test_as_another_lru_does() -> None:
    """The same hits as an ordered dictionary's, and never more than fits."""
    draw, theirs = random.Random(0), OrderedDict[int, None]()
    ours: Residency[int] = Residency(5, "lru")
    for _ in range(2000):
        key = min(int(draw.expovariate(0.15)), 20)
        assert (key in ours) == (key in theirs)
        ours.touch(key)
        gone = ours.need(key)
        theirs[key] = None
        theirs.move_to_end(key)
        assert gone == ([] if len(theirs) <= 5 else [theirs.popitem(last=False)[0]])
        assert len(ours) == ours.used <= 5


def test_skewed_uses_hit_more_by_frequency() -> None:
    """Zipf over 50 keys, room for 8: what is popular stays; the best any rule can do is the share of the first 8."""
    hits = {}
    for policy in ("frequency", "lru", "fifo"):
        draw = random.Random(1)
        keys: Residency[int] = Residency(8, policy)  # type: ignore[arg-type]
        weights = [1 / (i + 1) for i in range(50)]
        hits[policy] = 0
        for key in draw.choices(range(50), weights, k=4000):
            hits[policy] += key in keys
            keys.touch(key)
            keys.need(key)
    best = sum(weights[:8]) / sum(weights) * 4000
    assert 0.9 * best < hits["frequency"] < 1.02 * best
    assert hits["frequency"] > 1.15 * hits["lru"] > 1.15 * hits["fifo"]


def test_old_popularity_fades() -> None:
    keys: Residency[str] = Residency(2, half_life=10)
    for key in "a" * 50 + "b" * 15:
        keys.touch(key)
    assert keys.frequency("a") == pytest.approx(0.5**1.5, rel=0.05)
    assert keys.frequency("a") + keys.frequency("b") == pytest.approx(1)
    keys.need("a")
    keys.need("b")
    assert keys.need("c") == ["a"]


def test_worked_rows() -> None:
    """Pairs ab, ab, ac, ba: p = (1/4, 2/4, 1/4); from a, with κ = 1: b (2 + 1/2) / 4, c (1 + 1/4) / 4, a 1/4 / 4."""
    after: Transitions[str] = Transitions()
    assert after.row("a") == {}
    assert after.predict(["a"], 3) == []
    for now, then in ("ab", "ab", "ac", "ba"):
        after.observe(now, then)
    assert after.row("a") == {"b": 2.5 / 4, "c": 1.25 / 4, "a": 0.25 / 4}
    assert after.row("new") == {"b": 0.5, "c": 0.25, "a": 0.25}
    assert after.probability("new", "a") == 0
    assert after.predict(["a"], 2) == ["b", "c"]
    assert after.predict(["a", "b"], 3) == ["b", "a", "c"]  # 5/8 + 1/4, 1/16 + 5/8, 5/16 + 1/8
    assert after.predict([], 2) == []


def test_rows_sum_to_one_and_prediction_is_their_order() -> None:
    draw, after = random.Random(0), Transitions[int](0.5)
    for _ in range(300):
        after.observe(draw.randrange(6), draw.randrange(9), draw.randrange(1, 4))
    for now in range(8):
        assert sum(after.row(now).values()) == pytest.approx(1)
    both = {j: after.row(2)[j] + after.row(7)[j] for j in range(9)}
    assert after.predict([2, 7], 4) == sorted(both, key=both.__getitem__, reverse=True)[:4]


def test_a_chain_is_foretold_after_one_round() -> None:
    chain, after = [3, 1, 4, 0, 2], Transitions[int]()
    for now, then in zip(chain, chain[1:] + chain[:1], strict=True):
        after.observe(now, then)
    for now, then in zip(chain, chain[1:] + chain[:1], strict=True):
        assert after.predict([now], 1) == [then]


def test_refused() -> None:
    for wrong in (
        lambda: Residency(0),
        lambda: Residency(1, "random"),  # type: ignore[arg-type]
        lambda: Residency(1, half_life=0),
        lambda: Transitions(0),
    ):
        with pytest.raises(RankfoldError):
            wrong()
