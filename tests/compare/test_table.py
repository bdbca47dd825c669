"""Comparison's data, its table and its CSV."""

import csv
import io
import json

import pytest
from rich.console import Console

from rankfold.compare.job import Job
from rankfold.compare.result import FIGURES, Comparison, Contender, Failure, Forgetting, Inference, show_bytes
from rankfold.compare.table import as_csv, shown, table
from tests.compare.conftest import result

JOB = Job(kind="run", recipe={"seed": 0, "optimizer": {"lr": 0.01}, "batch": {"size": 4}}, threads=1)


def contender(name: str, losses: list[float], failures: tuple[Failure, ...] = ()) -> Contender:
    runs = tuple(
        result(
            JOB, loss, seed=seed,
            forgetting=Forgetting(loss=0.5, low=0.4, high=0.6, base=3.0),
            inference=Inference(base=0.1, unmerged=0.12, merged=None),
        )
        for seed, loss in enumerate(losses)
    )  # fmt: skip
    return Contender(
        name=name, axis="deltas", changes={}, size=None, lr=0.01, trials=(), runs=runs, failures=failures
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    failed = contender("kasa", [], (Failure(seed=None, reason="out of\nluck"),))
    return Comparison(
        title="t", command="rankfold compare", model="m", data="d", task="causal-lm", metric="held-out loss",
        higher_is_better=False, recipe={}, budget={}, seeds=(0, 1), search={}, rows={"train": 9}, threads=1, jobs=1,
        device="cpu", versions={}, started="", finished="",
        contenders=(failed, contender("dora", [2.0, 4.0]), contender("lora[red]", [1.0, 1.0])), definitions={},
    )  # fmt: skip


def test_the_best_comes_first_and_what_failed_last(comparison: Comparison) -> None:
    assert [c.name for c in comparison.ranked()] == ["lora[red]", "dora", "kasa"]
    upside_down = comparison.model_copy(update={"higher_is_better": True})
    assert [c.name for c in upside_down.ranked()] == ["dora", "lora[red]", "kasa"]


def test_means_and_deviations(comparison: Comparison) -> None:
    failed, dora, lora = comparison.contenders
    assert dora.summary(FIGURES["quality"]) == (3.0, pytest.approx(2**0.5))
    assert shown(dora, FIGURES["quality"]) == "3.0000 ± 1.4142"
    assert shown(lora, FIGURES["quality"]) == "1.0000"
    assert shown(lora, FIGURES["unmerged"]) == "1.20×"
    assert lora.summary(FIGURES["merged"]) is None
    assert shown(failed, FIGURES["quality"]) == ""


def test_the_table_has_a_line_for_each(comparison: Comparison) -> None:
    text = printed(comparison, 240)
    for said in ("held-out loss", "lora[red]", "searching 1/5", "failed", "+0.5000", "5 kB", "500 ms"):
        assert said in text
    assert "merged cost" not in text.replace("unmerged cost", "")  # nobody has it
    assert "besides" not in text


def test_a_narrow_table_leaves_out_the_last_figures(comparison: Comparison) -> None:
    text = printed(comparison, 80)
    for said in ("held-out loss", "lora[red]", "searching 1/5", "failed", "3.0000 ± 1.4142", "besides: "):
        assert said in text
    assert "+0.5000" not in text


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(comparison.ranked(), {"dora": "searching 1/5"}, comparison.metric, console))
    return console.export_text()


def test_the_csv_has_a_line_for_each_run_and_failure(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [(line["contender"], line["seed"]) for line in lines] == [
        ("kasa", ""), ("dora", "0"), ("dora", "1"), ("lora[red]", "0"), ("lora[red]", "1"),
    ]  # fmt: skip
    assert lines[0]["failure"] == "out of\nluck"
    assert (lines[2]["quality"], lines[2]["rate"], lines[2]["memory"]) == ("4.0", "0.01", "1000000")
    assert lines[2]["merged"] == ""


def test_json_holds_everything(comparison: Comparison) -> None:
    text = comparison.model_dump_json()
    assert Comparison.model_validate(json.loads(text)) == comparison


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (12e9, "12 GB")])
def test_sizes(size: float, text: str) -> None:
    assert show_bytes(size) == text
