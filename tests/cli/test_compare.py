"""`rankfold compare`: its options as a plan, what it shows, its exit code."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankfold import cli
from rankfold.compare.plan import Plan, recipe_of
from tests.compare.conftest import Answering, contest, well
from tests.compare.test_table import comparison, contender  # noqa: F401
from tests.train import tiny

Given = dict[str, Any]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, comparison: Any) -> Given:  # noqa: F811
    """What `rankfold.compare.run.compare` was called with; it returns a comparison at once."""
    given: Given = {}

    def run(plan: Plan, output: Path, show: Callable[[Any], Any], **options: Any) -> Any:
        given.update(options, plan=plan, output=output)
        made = contest(plan, Path(output), Answering(well))
        show(made)
        made.states[0].doing = "training 1/3"
        show(made)
        return given.get("found", comparison)

    monkeypatch.setattr("rankfold.compare.run.compare", run)
    return given


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_questions(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def test_options_make_a_plan(given: Given, rows: Path) -> None:
    code = cli.run(
        [
            "compare", "--model", "org/model", "--data", str(rows), "--format", "chat",
            "--methods", "lora,kasa:rank=4,galore", "--budget", "parameters=2k|minutes=5", "--seeds", "2",
            "--set", "recipe.data.columns.prompt=question", "--set", "search.trials=7", "--jobs", "3", "--resume",
        ]
    )  # fmt: skip
    assert code == 0
    plan = given["plan"]
    assert [entry.name for entry in plan.contenders] == ["lora", "kasa:rank=4", "galore"]
    assert (plan.budget.parameters, plan.budget.minutes, plan.seeds, plan.search.trials) == (2000, 5.0, (0, 1), 7)
    assert (plan.recipe.data.format, plan.recipe.data.columns) == ("chat", {"prompt": "question"})
    assert recipe_of(plan, plan.contenders[1], "").method.hyper == {"rank": 4}
    assert (given["output"], given["jobs"], given["resume"], given["ray"]) == (Path("runs/compare"), 3, True, None)


def test_a_file_takes_overrides(given: Given, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"recipe: {{model: org/m, data: {{path: {rows}, format: text}}, budget: {{steps: 3}}}}\ncontenders: [lora]\n"
    )
    assert cli.run(["compare", str(file), "--seeds", "1", "--set", "recipe.budget.steps=9"]) == 0
    assert (given["plan"].seeds, given["plan"].recipe.budget.steps) == ((0,), 9)
    assert given["output"] == Path("runs/mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "m", "--data", "d"],
            "give a COMPARE.yaml, or --model, --data and --methods: --methods is missing",
        ),
        (["there.yaml", "--methods", "lora"], "--methods: there.yaml says that"),
        (["none.yaml"], "cannot read the comparison none.yaml"),
        (
            ["--model", "m/m", "--data", "ROWS", "--methods", "lora"],
            "the columns answer, kind, question do not say what a row means: give --format",
        ),
    ],
)
def test_mistakes(arguments: list[str], said: str, rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", *(str(rows) if part == "ROWS" else part for part in arguments)]) == 2
    assert said in capfd.readouterr().err


def test_what_is_said_while_it_runs_and_afterwards(given: Given, rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "o/m", "--data", str(rows), "--format", "text", "--methods", "lora,dora"]
    assert cli.run(["compare", *options]) == 0
    out, err = capfd.readouterr()
    assert [line for line in err.splitlines() if line.startswith(("lora:", "dora:"))] == [
        "lora: waiting", "dora: waiting", "lora: training 1/3",
    ]  # fmt: skip
    assert "failed: kasa: out of luck" in err
    assert "report: runs/compare/comparison.html" in err
    assert "lora[red]" in out


def test_a_terminal_gets_a_table_that_is_rewritten(given: Given, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("rankfold.cli.compare.stderr", Console(file=screen, force_terminal=True, width=160))
    assert cli.run(["compare", "--model", "o/m", "--data", str(rows), "--format", "text", "--methods", "lora"]) == 0
    assert screen.getvalue().index("waiting") < screen.getvalue().index("training 1/3")


def test_nothing_but_failures_is_a_failure(given: Given, rows: Path, comparison: Any) -> None:  # noqa: F811
    given["found"] = comparison.model_copy(update={"contenders": comparison.contenders[:1]})
    assert cli.run(["compare", "--model", "o/m", "--data", str(rows), "--format", "text", "--methods", "lora"]) == 1
