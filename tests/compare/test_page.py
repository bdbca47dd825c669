"""The comparison's page: that it says what was found and what is chance, and opens without a network."""

import re
from pathlib import Path

import pytest

from rankfold.compare.page import front, page, write_page
from rankfold.compare.result import Point
from tests.browser import addresses, look, needs_browser
from tests.compare.made import comparison, contender, failed, run


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds to draw."""
    monkeypatch.setattr("rankfold.compare.page.figure", lambda title, *_: f"<h2>{title}</h2>")


@needs_browser
def test_a_browser_shows_plots_and_tables_without_a_network(tmp_path: Path) -> None:
    seen = look(write_page(comparison(), tmp_path / "report.html"))
    assert seen.requests == []
    assert seen.console == []
    assert addresses((tmp_path / "report.html").read_text()) == []
    for title in (
        "Summary", "What did not finish", "Quality and what it costs", "Learning curves", "Size of the change",
        "Directions that the change takes", "Learning-rate searches", "Every run", "To do it again",
    ):  # fmt: skip
        assert f">{title}" in seen.dom
    assert seen.dom.count("<svg") == 5
    assert seen.dom.count("<table") == 6
    assert len(seen.picture) > 50_000


@pytest.mark.usefixtures("words_only")
def test_it_says_how_to_do_it_again() -> None:
    made = comparison(contender("lora", 1.4), failed())
    text = page(made)
    assert addresses(text) == []
    assert "default-src 'none'" in text
    assert f"<pre>{made.command}</pre>" in text
    for words in ("2026-11-23 15:00 UTC", "torch 2.13.0", "0, 1, 2", "210k trained parameters", "rank = 8"):
        assert words in text


@pytest.mark.usefixtures("words_only")
def test_numbers_have_units_and_a_spread() -> None:
    one = contender("lora", 1.4)
    text = page(comparison(one, contender("dora", 1.9)))
    assert "810 kB" in text
    assert "200k" in text
    assert re.search(r">40\d ms<small>± [\d.]+ ms</small>|>39\d ms<small>± [\d.]+ ms</small>", text)
    assert page(comparison(contender("lora", 1.4, seeds=1))).count("<small>±") == 0
    assert "trained parameters: the same for all" in text
    assert "least trained parameters: lora" in page(comparison(one, contender("dora", 1.9, cost=2.0)))


@pytest.mark.usefixtures("words_only")
def test_differences_within_the_spread_are_called_so() -> None:
    wide = [("one", 1.0, 2.0), ("two", 1.2, 2.0)]
    some = [contender(name, 0, runs=(run(0, a, layers=()), run(1, b, layers=()))) for name, a, b in wide]
    close = page(comparison(*some))
    assert "not to be told from it by these runs" in close
    assert re.search(r"\(\+0\.\d+\)", close)
    apart = page(comparison(contender("one", 1.0), contender("two", 2.0)))
    assert "larger than the spread" in apart
    assert not re.search(r"\(\+[\d.]+\)", apart)
    single = page(comparison(contender("one", 1.0, seeds=1), contender("two", 2.0, seeds=1)))
    assert "should be believed without more seeds" in " ".join(single.split())
    assert "One seed (0)." in single


@pytest.mark.usefixtures("words_only")
def test_a_method_has_one_colour_and_the_order_does_not_change_it() -> None:
    text = page(comparison(contender("worse", 2.0), contender("better", 1.0)))
    assert text.index(">better<") < text.index(">worse<")
    dots = set(re.findall(r'background: (var\(--s\d\))"></i>(\w+)', text))
    assert dots == {("var(--s0)", "worse"), ("var(--s1)", "better")}


@pytest.mark.usefixtures("words_only")
def test_failures_have_their_reason_and_nothing_is_trusted() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    text = page(comparison(contender("lora", 1.4), failed("bad" + hostile, reason=hostile), title=hostile))
    assert hostile not in text
    assert text.count("&lt;img src=x") >= 3
    assert "before any run" in text


def test_nothing_ran() -> None:
    text = page(comparison(failed(), failed("other", "out of memory")))
    assert "out of memory" in text
    assert "<svg" not in text
    assert "Summary" not in text


def test_without_searches_layers_or_forgetting() -> None:
    bare = run(0, 1.2, layers=(), forgetting=None, inference=None, step_seconds=None, missing={"step": "one step only"})
    text = page(comparison(contender("full", 1.2, runs=(bare,)), budget={}, search={}))
    assert "Learning-rate searches" not in text
    assert "Size of the change" not in text
    assert "step: one step only" in text


def test_accuracies_are_better_when_higher_and_have_their_own_curves() -> None:
    curve = tuple(Point(step=step, seconds=step, loss=1.0, accuracy=0.5 + step / 100) for step in (0, 10))
    scores = {"before": {"loss": 2.0, "accuracy": 0.125}, "curve": curve, "layers": ()}
    some = [contender(name, 0, runs=(run(0, 1, quality=best, **scores),)) for name, best in (("a", 0.6), ("b", 0.7))]
    text = page(comparison(*some, metric="accuracy", higher_is_better=True))
    assert text.index(">b<") < text.index(">a<")
    assert "best accuracy: b" in text
    assert ">0.1250<" in text
    assert ">held-out accuracy<" in text
    assert "better ↖" in text


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0)]  # cost, loss
    assert front(points, higher=False) == [0, 2, 4]
    assert front([(cost, -loss) for cost, loss in points], higher=True) == [0, 2, 4]
    assert front([(1.0, 0.5), (2.0, 0.9), (3.0, 0.8)], higher=True) == [0, 1]
