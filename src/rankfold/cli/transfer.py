"""`rankfold transfer`: an adapter on another base model, an update of its own or a different one."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rankfold.cli._common import JsonOption, SetOption, check_new, print_json, quiet_loading, say, stderr, stdout
from rankfold.errors import RankfoldError

_SHOWN = 12  # layers of the table; all are in the JSON
_EPILOG = (
    "[bold]portllm[/bold]: to an update of the model (more pretraining, another release) with the same layers. The "
    "adapter's numbers stay as they are. With --from, the model that it was trained on, a table says what the update "
    "did to each layer: a small size and a cosine near 1 speak for it. --undo takes it back.\n\n"
    "[bold]trans-lora[/bold]: to any model, without the data: a new adapter learns what the old one answers to prompts "
    "that a model wrote around five examples. Where the data still is, --prepare makes the kit that this needs, from "
    "the recipe.yaml beside the adapter.\n\n"
    "Example: rankfold transfer runs/gsm8k/adapter --how portllm --to NEW --from OLD --output ported\n\n"
    "Example: rankfold transfer runs/gsm8k/adapter --prepare --name GSM8K --output kit\n\n"
    "Example: rankfold transfer runs/gsm8k/adapter --how trans-lora --kit kit --to OTHER --output runs/moved"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(transfer)


def transfer(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter, or its hub id.")],
    output: Annotated[Path, typer.Option("--output", help="New folder: the adapter (portllm), the run, or the kit.")],
    to: Annotated[str | None, typer.Option("--to", help="The model that it goes to.")] = None,
    how: Annotated[Literal["portllm", "trans-lora"], typer.Option("--how", help="How it goes there.")] = "portllm",
    source: Annotated[
        str | None, typer.Option("--from", help="The model that it was trained on.  [trans-lora: default: the kit's]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="portllm: to weights that look like another model's.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="portllm: back to the model it was on before.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="trans-lora: make the kit, where the data is.")] = False,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="With --prepare: of the adapter.  [default: beside the adapter]"),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="With --prepare: what the data set is called.")] = "this",
    kit: Annotated[Path | None, typer.Option("--kit", help="trans-lora: folder that --prepare wrote.")] = None,
    generator: Annotated[
        str | None, typer.Option("--generator", help="trans-lora: the model that writes prompts.  [default: --to]")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=2, help="trans-lora: prompts to train on.  [default: as the data had]")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="trans-lora: longest answer to learn from, in tokens.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="trans-lora: prompts a forward pass.")] = 16,
    set_: SetOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="trans-lora: of all that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="trans-lora: go on with what was stopped.")] = False,
    json: JsonOption = False,
) -> None:
    """Take an adapter to another base model."""
    if not resume:
        check_new(output)
    if undo:
        from rankfold.compose.portllm import unport

        unport(adapter, output)
        _done({"adapter": str(output)}, [f"adapter: {output}"], json)
    elif prepare:
        _prepare(Path(adapter), output, recipe, name, set_ or [], batch, resume, json)
    elif to is None:
        raise RankfoldError("--to: say the model that the adapter goes to")
    elif how == "portllm":
        _port(adapter, to, output, source, force, json)
    elif kit is None:
        raise RankfoldError("--kit: trans-lora needs what --prepare makes where the data is")
    else:
        from dataclasses import asdict

        from rankfold.compose.trans_lora import transfer as move
        from rankfold.train.display import ConsoleDisplay

        quiet_loading()
        report = move(
            adapter, kit, to, output, source=source, generator=generator, count=count, changes=set_ or (),
            max_new_tokens=max_new_tokens, size=batch, seed=seed, resume=resume, display=ConsoleDisplay(stderr),
        )  # fmt: skip
        before, after = report.before["loss"], report.after["loss"]
        lines = [
            f"loss on the source's held-out answers [bold]{before:.4f} → {after:.4f}[/bold], {report.steps} steps",
            f"adapter: {output / 'adapter'}",
        ]
        _done({"adapter": str(output / "adapter"), "report": asdict(report)}, lines, json)


def _prepare(
    adapter: Path, output: Path, recipe: Path | None, name: str, changes: list[str], size: int, resume: bool, json: bool
) -> None:
    from rankfold.compose.trans_lora import prepare, read_kit
    from rankfold.train.display import ConsoleDisplay
    from rankfold.train.recipe_file import read_recipe

    quiet_loading()
    run = read_recipe(recipe or adapter.parent / "recipe.yaml")
    display = ConsoleDisplay(stderr)
    prepare(run, output, name=name, changes=changes, size=size, resume=resume, display=display)
    made = read_kit(output)
    lines = [f"kit: {output}, with {len(made.seeds)} of {made.count} prompts and a discriminator"]
    _done({"kit": str(output), "count": made.count, "seeds": list(made.seeds)}, lines, json)


def _port(adapter: str, to: str, output: Path, source: str | None, force: bool, json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from rankfold.compose.portllm import port
    from rankfold.core.checkpoint import read
    from rankfold.train.display import ConsoleDisplay
    from rankfold.train.places import locate

    new, old = (
        None if place is None else str(locate(place, key) or place) for place, key in ((to, "--to"), (source, "--from"))
    )
    with ConsoleDisplay(stderr).bar("reading the weights", len(read(adapter).document.sites)) as advance:
        _, drifts = port(adapter, str(new), output, old=old, force=force, progress=advance)
    if not json and drifts:
        table = Table("layer", "size of the update ‖Δθ‖ / ‖θ‖", "cosine of the principal directions")
        for site, one in sorted(drifts.items(), key=lambda item: -item[1].size)[:_SHOWN]:
            table.add_row(site, f"{one.size:.4f}", "-" if one.cosine is None else f"{one.cosine:.4f}")
        stdout.print(table)
        if len(drifts) > _SHOWN:
            stdout.print(f"and {len(drifts) - _SHOWN} more, where the update was smaller; --json has all")
    layers = {site: asdict(one) for site, one in drifts.items()}
    document = read(output).document
    found: dict[str, Any] = {"adapter": str(output), "portings": len(document.ported), "layers": layers}
    _done({**found, "forced": document.forced}, [f"adapter: {output}, on {document.base}"], json)


def _done(found: dict[str, Any], lines: list[str], json: bool) -> None:
    if json:
        print_json(found)
    else:
        say(lines)
