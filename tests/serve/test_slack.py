"""The room that inference leaves in a step, of latencies that are planted."""

import random

import pytest

from rankfold.serve.slack import Slack

A, B = 0.010, 0.0002  # seconds a step, and a token


def shown(slack: Slack, sizes: list[int], a: float = A, b: float = B) -> Slack:
    for n in sizes:
        slack.observe(n, a + b * n)
    return slack


def test_it_finds_the_line_and_what_fits_under_the_target() -> None:
    slack = shown(Slack(slo=0.050, most=512), [1, 3, 8, 20, 64, 128])
    assert slack.line == pytest.approx((A, B))
    assert slack.latency(100) == pytest.approx(0.030)
    for n_inf in (0, 1, 50, 199, 200, 201, 400):  # 200 tokens take 0.050 s
        n_ft = slack.room(n_inf)
        assert n_ft == max(0, 200 - n_inf)
        assert not n_ft or slack.latency(n_inf + n_ft) <= slack.slo + 1e-9
        assert slack.latency(n_inf + n_ft + 1) > slack.slo


def test_a_step_has_no_more_than_its_tokens() -> None:
    slack = shown(Slack(slo=1.0, most=96), [1, 8, 64, 128])
    assert [slack.room(n) for n in (0, 32, 95, 96, 120)] == [96, 64, 1, 0, 0]


def test_a_target_that_even_an_empty_step_misses() -> None:
    """Nothing goes beside a request; alone one token does, or it could never be seen that steps are fast again."""
    slack = shown(Slack(slo=0.005, most=512, keep=8), [1, 8, 64, 128])
    assert [slack.room(n) for n in (0, 1, 9)] == [1, 0, 0]
    for _ in range(40):
        n = slack.room(0)
        slack.observe(n, 0.1 * (A + B * n))
    assert slack.room(0) == 200


def test_steps_that_had_to_wait_do_not_count_for_much() -> None:
    rng, slack = random.Random(0), Slack(slo=0.050, most=512)
    for i in range(400):
        n = rng.choice([1, 5, 20, 70, 130])
        late = 2.0 if i % 5 == 0 else 0.0
        slack.observe(n, (A + B * n) * rng.uniform(0.98, 1.02) + late)
    assert slack.line == pytest.approx((A, B), rel=0.1)
    assert slack.room(10) == pytest.approx(190, abs=10)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    slack = shown(Slack(slo=0.050, most=512, keep=32), [1, 8, 64, 128] * 20)
    shown(slack, [1, 8, 64, 128] * 8, a=2 * A, b=2 * B)
    assert slack.line == pytest.approx((2 * A, 2 * B))
    assert slack.room(0) == 75


def test_it_goes_no_further_than_twice_what_is_known() -> None:
    slack = Slack(slo=10.0, most=512)
    assert slack.room(0) == 1
    rooms = []
    for _ in range(12):
        rooms.append(slack.room(0))
        slack.observe(rooms[-1], A + B * rooms[-1])
    assert rooms == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512]


def test_one_size_alone_is_put_down_to_its_tokens() -> None:
    slack = shown(Slack(slo=0.050, most=512), [10] * 5)  # 0.012 s
    assert slack.latency(20) == pytest.approx(0.024)
    assert slack.room(10) == 10  # twice 10, though 41 would fit


def test_latencies_that_fall_with_the_tokens_are_noise() -> None:
    slack = Slack(slo=0.050, most=64)
    slack.observe(1, 0.012)
    slack.observe(32, 0.010)
    assert slack.line == pytest.approx((0.011, 0.0))
    assert slack.room(4) == 60


def test_what_comes_after_the_inference_has_the_time_that_it_left() -> None:
    slack = shown(Slack(slo=0.050, most=96), [1, 8, 64, 128])
    assert [slack.room(16, spent=spent) for spent in (0.0, 0.024, 0.030, 0.039, 0.041, 0.060)] == [80, 80, 50, 5, 0, 0]


def test_room_is_left_for_what_steps_differ_by() -> None:
    slack = Slack(slo=0.050, most=512)
    for i in range(100):
        for n in (1, 8, 64, 128):
            slack.observe(n, A + B * n + (0.002 if i % 2 else -0.002))
    assert slack.line == pytest.approx((A, B))
    assert slack.spread == pytest.approx(0.002)
    assert slack.room(0) == 180  # 0.050 - 2 x 0.002 s


def test_what_had_no_room_for_long_is_tried_again() -> None:
    slack = Slack(slo=0.050, most=512, keep=4)
    assert slack.room(8, untried=30) == 30
    slack.observe(38, 9.0)
    assert [slack.room(8, untried=30) for _ in range(6)] == [0, 0, 0, 0, 30, 30]
