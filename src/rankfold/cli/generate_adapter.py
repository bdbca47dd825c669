"""`rankfold train-generator` and `rankfold generate-adapter`: networks whose output is an adapter."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli._common import (
    DtypeOption,
    JsonOption,
    SetOption,
    check_new,
    load_base,
    print_json,
    quiet_loading,
    say,
    stderr,
)
from rankfold.errors import RankfoldError


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold train-generator examples/generators/reader.yaml --output runs/reader")(
        train_generator
    )
    app.command(
        epilog="Example: rankfold generate-adapter --generator runs/reader --context handbook.txt --output handbook"
    )(generate_adapter)


def train_generator(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Which generator, for what, and how long.")],
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for everything the run writes.  [default: runs/RECIPE]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the output.")] = False,
    json: JsonOption = False,
) -> None:
    """Train a network that makes adapters: of a text (generative-adapter), or for a task (icm-lora).

    Ctrl-C saves a checkpoint; the same command with --resume goes on from it.
    """
    from dataclasses import asdict

    from rankfold.train.display import ConsoleDisplay
    from rankfold.train.generators import GeneratorRecipe
    from rankfold.train.generators import train_generator as train
    from rankfold.train.processes import processes
    from rankfold.train.recipe_file import read_recipe

    quiet_loading()
    folder = output or Path("runs") / recipe.stem
    given = read_recipe(recipe, set_ or (), schema=GeneratorRecipe)
    report = train(given, folder, resume=resume, display=ConsoleDisplay(stderr))
    if not processes().is_main_process:
        return
    if json:
        print_json(asdict(report))
        return
    change = f"held-out loss [bold]{report.before:.4f} → {report.after:.4f}[/bold]"
    lost = [
        f"{task}: adapters read as LoRAs, error of a layer at most {error:.4f}"
        for task, error in report.read.items() if error > 0
    ]  # fmt: skip
    say([f"{change}, {report.steps} steps, {report.seconds:.0f} s", *lost, f"generator: {folder / 'generator'}"])


def generate_adapter(
    generator: Annotated[Path, typer.Option("--generator", help="Folder of a generator, or of the run that made it.")],
    context: Annotated[
        list[Path],
        typer.Option(
            "--context", help="Text to know, read in this order if repeated; for icm-lora, examples of the task."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="New folder for the adapter.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Base model, as for train.  [default: that of the run]")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")] = "generated",
    task: Annotated[
        str | None, typer.Option("--task", help="icm-lora: the task whose scale it gets.  [default: the nearest]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="icm-lora: of the draw.  [default: 0]")] = None,
    dtype: DtypeOption = "float32",
    json: JsonOption = False,
) -> None:
    """Make an ordinary LoRA of a text, without training: one pass of a generator over it."""
    check_new(output)
    if missing := [path for path in context if not path.is_file()]:
        raise RankfoldError(f"--context: no such file: {missing[0]}")
    run = generator / "recipe.yaml"
    folder = generator / "generator" if run.is_file() else generator

    import rankfold
    from rankfold.compose.generator import generate, load_generator

    made = load_generator(folder)
    loaded = load_base(model or _base_of(run), dtype, None)
    text = "\n\n".join(path.read_text("utf-8", errors="replace") for path in context)
    options: dict[str, Any] = {key: value for key, value in (("task", task), ("seed", seed)) if value is not None}
    with stderr.status("reading the context"):
        adapter = generate(made, loaded.model, loaded.processor, text, name, **options)
        rankfold.save(loaded.model, output, name=adapter.name)
    if json:
        ranks = {site: delta.A.shape[0] for site, delta in adapter.deltas.items()}
        print_json({"adapter": str(output), "parameters": adapter.num_parameters(), "ranks": ranks})
        return
    say([f"adapter: {output}", f"{adapter.num_parameters():,} numbers in {len(adapter.deltas)} layers"])


def _base_of(recipe: Path) -> str:
    """The base model of the run whose recipe that is."""
    if not recipe.is_file():
        raise RankfoldError("--model: name the base model, since --generator is no folder of a run that says it")
    from rankfold.train.generators import GeneratorRecipe
    from rankfold.train.recipe_file import read_recipe

    return read_recipe(recipe, schema=GeneratorRecipe).model.path
