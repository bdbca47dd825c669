"""`rankfold skills`: a folder of adapters for one base model, and mixtures of them (PSEC)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    stdout,
    weight_list,
)  # fmt: skip
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.compose.psec import Library, Skill

LibraryArgument = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder of skills.")]
NameArgument = Annotated[str, typer.Argument(metavar="SKILL", help="Its name in the library.")]
_EPILOG = (
    "Example: rankfold skills add skills runs/gsm8k/adapter --name maths --about 'word problems'\n\n"
    "Example: rankfold skills compose skills maths tweets --recipe task.yaml --output runs/mixed"
)


def register(app: typer.Typer) -> None:
    skills = typer.Typer(help="Keep skills (adapters of one base model) in a folder, and mix them.", epilog=_EPILOG)
    for command in (add, describe, remove, compose):
        skills.command()(command)
    skills.command("list")(list_)
    app.add_typer(skills, name="skills", epilog=_EPILOG)


def add(
    library: LibraryArgument,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter, or its hub id.")],
    name: Annotated[str | None, typer.Option("--name", help="In the library.  [default: the adapter's]")] = None,
    about: Annotated[str, typer.Option("--about", help="What it is for.")] = "",
    json: JsonOption = False,
) -> None:
    """Copy an adapter into a library, which is made if it is not there."""
    from rankfold.compose.psec import Library

    _show([Library(library).save(adapter, name, about)], json)


def list_(library: LibraryArgument, json: JsonOption = False) -> None:
    """What skills a library has."""
    _show(_there(library).skills(), json)


def describe(library: LibraryArgument, skill: NameArgument, json: JsonOption = False) -> None:
    """What a skill is, of which base, and how large."""
    found = asdict(_there(library).describe(skill))
    if json:
        print_json(found)
        return
    for key, value in found.items():
        stdout.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)


def remove(library: LibraryArgument, skill: NameArgument) -> None:
    """Delete a skill from a library."""
    _there(library).remove(skill)
    say([f"removed: {skill}"])


def compose(
    library: LibraryArgument,
    skills: Annotated[list[str], typer.Argument(metavar="SKILL...", help="Their names in the library.")],
    output: Annotated[Path, typer.Option("--output", help="New folder for the adapter (with --recipe, in adapter/).")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Learn the weights on this recipe's model, data and budget.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Base model, where no recipe names it.")] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One each; with --recipe, at the start. Default: 1/N."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also of another base; the new adapter says so.")] = False,
    dtype: DtypeOption = "float32",
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Mix skills in parameter space: one adapter `Σ α_i B_i A_i` that holds them all.

    The weights are those given, or learnt on the data of a recipe, of which the model, the data, the optimizer and the
    budget count. Weights that depend on the input are made from Python: rankfold.compose.psec.compose.
    """
    check_new(output)
    start = weight_list(weights)
    if start is not None and len(start) != len(skills):
        raise RankfoldError(f"--weights: {len(start)} numbers for {len(skills)} skills")
    kept = _there(library)
    for skill in skills:  # before a model is loaded for them
        kept.path(skill)
    if recipe is not None:
        from rankfold.train.display import ConsoleDisplay
        from rankfold.train.recipe_file import read_recipe
        from rankfold.train.skills import learn

        quiet_loading()
        changes = [*(() if model is None else (f"model.path={model}",)), *(set_ or ())]
        run = read_recipe(recipe, changes)
        learnt = learn(run, kept, skills, output, start=start, force=force, display=ConsoleDisplay(stderr))
        found, folder, said = learnt.weights, output / "adapter", asdict(learnt)
        lines = [f"held-out loss [bold]{learnt.before:.4f} → {learnt.after:.4f}[/bold], {learnt.steps} steps"]
    elif model is None:
        raise RankfoldError("give --recipe to learn the weights, or --model for those of --weights")
    else:
        import rankfold

        loaded = load_base(model, dtype, None)
        made = kept.compose(loaded.model, skills, weights="constant", start=start, force=force)
        rankfold.save(loaded.model, output, made.name)
        found = dict(zip(skills, start or [1 / len(skills)] * len(skills), strict=True))
        folder, said, lines = output, {"weights": found}, []
    if json:
        print_json({"adapter": str(folder), **said})
        return
    mixed = ", ".join(f"{skill} {weight:+.3f}" for skill, weight in found.items())
    say([*lines, f"weights: {mixed}", f"adapter: {folder}"])


def _there(folder: Path) -> "Library":
    from rankfold.compose.psec import Library

    if not folder.is_dir():
        raise RankfoldError(f"there is no library {folder}: rankfold skills add makes one")
    return Library(folder)


def _show(skills: "list[Skill]", json: bool) -> None:
    if json:
        print_json([asdict(skill) for skill in skills])
        return

    from rich.table import Table

    table = Table("skill", "method", "layers", "numbers", "bytes", "base", "about")
    for one in skills:
        size = (str(one.layers), f"{one.parameters:,}", f"{one.bytes:,}")
        table.add_row(one.name, one.method, *size, one.base, one.about)
    stdout.print(table)
