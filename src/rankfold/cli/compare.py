"""`rankfold compare`: contenders trained alike, and a report of what each is good for."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli._common import MODEL_HELP, JsonOption, SetOption, quiet_loading, say, stderr, stdout
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.compare.contest import Contest


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: rankfold compare --model MODEL --data rows.jsonl --methods lora,dora,kasa:rank=4,galore "
        "--budget parameters=200k --seeds 3 --output runs/compared"
    )(compare)


def compare(
    plan: Annotated[
        Path | None, typer.Argument(metavar="COMPARE.yaml", help="What to compare; or say it by the options.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help=MODEL_HELP)] = None,
    data: Annotated[str | None, typer.Option("--data", help="File, directory, hub id, package:..., cache:...")] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="What a row means, as data.format.  [default: by its columns]")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="SLUG[:KEY=VALUE]...,...", help="Contenders: methods, or others on a LoRA."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="parameters=200k|memory=1GB|minutes=5", help="For each of them.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each.  [default: 3]")] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="A general text, to measure forgetting (causal language models).")
    ] = None,
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for everything it writes.  [default: runs/COMPARE]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was stopped or killed.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Trainings at once.  [default: as contenders and cores allow]")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Train on this Ray cluster, or a new one: local.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train contenders on the same data under the same budget, measure them alike, and report.

    Ctrl-C saves checkpoints; the same command with --resume goes on from them. With options alone, keys of the plan
    are set by --set: --set recipe.budget.steps=100, --set search.trials=8.
    """
    from rankfold.compare.plan import make_plan, read_plan
    from rankfold.train.recipe_file import apply_override

    given: dict[str, Any] = {"budget": budget, "seeds": seeds, "text": text}
    given = {key: value for key, value in given.items() if value is not None}
    if plan is not None:
        if others := [name for name, value in (("model", model), ("data", data), ("methods", methods)) if value]:
            raise RankfoldError(f"--{others[0]}: {plan} says that; change it there, or by --set")
        read = read_plan(plan, [*(f"{key}={value}" for key, value in given.items()), *(set_ or ())])
    else:
        if absent := [name for name, v in (("model", model), ("data", data), ("methods", methods)) if v is None]:
            raise RankfoldError(f"give a COMPARE.yaml, or --model, --data and --methods: --{absent[0]} is missing")
        from rankfold.compare.columns import format_of

        rows = {"path": data, "format": format_ or format_of(str(data))}
        recipe = {"model": model, "data": rows, "method": "lora", "budget": {"epochs": 1}}
        values = {"recipe": recipe, "contenders": str(methods).split(","), **given}
        for override in set_ or ():
            apply_override(values, override)
        read = make_plan(values, "options")
    folder = output or Path("runs") / (plan.stem if plan is not None else "compare")

    from rich.markup import escape

    from rankfold.compare.run import compare as run
    from rankfold.compare.table import table

    quiet_loading()
    with _following() as show:
        command = shlex.join(["rankfold", *sys.argv[1:]])
        found = run(read, folder, resume=resume, jobs=jobs, ray=ray, command=command, show=show)
    if json:
        print(found.model_dump_json(indent=2))
        return
    stdout.print(table(found.ranked(), {}, found.metric, stdout))
    for contender in found.contenders:
        for failure in contender.failures:
            where = "" if failure.seed is None else f", seed {failure.seed}"
            say([escape(f"failed: {contender.name}{where}: {' '.join(failure.reason.split())[-600:]}")])
    say(
        [f"report: {folder / 'comparison.html'}", f"numbers: {folder / 'comparison.json'}, {folder / 'comparison.csv'}"]
    )
    if all(contender.failed for contender in found.contenders):
        raise typer.Exit(1)


@contextmanager
def _following() -> Iterator[Any]:
    """A table that is rewritten while things happen; where the console is no terminal, a line for each."""
    from rich.live import Live

    from rankfold.compare.table import table

    if not stderr.is_terminal:
        said: dict[str, str] = {}

        def tell(contest: "Contest") -> None:
            for state in contest.states:
                if said.get(state.entry.name) != state.doing:
                    said[state.entry.name] = state.doing
                    stderr.print(f"{state.entry.name}: {state.doing}", markup=False, highlight=False)

        yield tell
        return
    with Live(console=stderr, auto_refresh=False, transient=True) as live:

        def show(contest: "Contest") -> None:
            doing = {state.entry.name: state.shown for state in contest.states}
            live.update(table([s.contender() for s in contest.states], doing, "quality", stderr), refresh=True)

        yield show
