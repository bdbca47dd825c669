"""`rankfold similar`: how alike two adapters are."""

from typing import TYPE_CHECKING, Annotated

import typer

from rankfold.cli._common import JsonOption, print_json, stderr, stdout

if TYPE_CHECKING:
    from rankfold.compose.similar import Similarity

_EPILOG = (
    "cosine: the inner product of two changes ΔW of a weight over their norms. norm: B's over A's. outputs and inputs: "
    "how far the spaces that they write to and read from overlap, / how far random ones of these ranks would. "
    "alignment: how well their leading singular directions agree, whatever their size (R of arXiv 2402.04051, γ = "
    "0.3). In the last line cosine and norm are of the adapters as a whole, the rest are means.\n\n"
    "Example: rankfold similar runs/gsm8k/adapter runs/orca/adapter"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(similar)


def similar(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a saved adapter, or its hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one: of any method and rank.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub id of the base model, for changes that depend on its weights."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Show each layer, or the sum only.")] = True,
    json: JsonOption = False,
) -> None:
    """Compare two adapters, layer by layer and in sum: direction, size, subspaces, ranks and base. Loads no model."""
    from rankfold.compose.similar import similar as compare

    with stderr.status("comparing"):
        found = compare(a, b, model=model)
    if json:
        print_json(found.as_dict())
    else:
        _show(found, layers)


def _show(found: "Similarity", layers: bool) -> None:
    from rich.table import Table

    table = Table("layer", "cosine", "norm", "outputs", "inputs", "alignment", "ranks")
    for site, layer in found.layers.items() if layers else ():
        outputs, inputs = layer.by_chance or (None, None)
        table.add_row(
            site,
            _number(layer.cosine),
            _number(layer.ratio),
            f"{_number(layer.outputs)} / {_number(outputs)}",
            f"{_number(layer.inputs)} / {_number(inputs)}",
            _number(layer.alignment),
            f"{layer.ranks[0]}, {layer.ranks[1]}",
        )
    measures = (found.cosine, found.ratio, found.outputs, found.inputs, found.alignment)
    table.add_row(f"all {len(found.layers)}", *map(_number, measures), "", style="bold")
    stdout.print(table)
    for name, method, alone in zip(found.names, found.methods, found.only, strict=True):
        rest = f"; alone on {len(alone)} layers: {', '.join(alone[:3])}{' …' * (len(alone) > 3)}" if alone else ""
        stdout.print(f"{name}: {method}{rest}", highlight=False)
    lost = max((max(layer.errors) for layer in found.layers.values()), default=0.0)
    if lost > 1e-4:
        stdout.print(f"[yellow]not compared[/yellow]: up to {lost:.1%} of a layer's change, which is no product")
    if found.bases is not None:
        stdout.print(f"[yellow]other bases[/yellow]: {found.bases}", highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
