"""`rankfold methods`: every registered component, and what each method can do."""

from typing import Annotated

import typer

from rankfold.cli._common import JsonOption, print_json, stdout
from rankfold.errors import RankfoldError


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold methods --axis deltas")(methods)


def methods(
    axis: Annotated[str | None, typer.Option("--axis", help="Only this axis: deltas, inits, ...")] = None,
    json: JsonOption = False,
) -> None:
    """List the methods, inits and callbacks there are, with what each supports."""
    from rich.table import Table

    import rankfold

    entries = rankfold.methods()
    axes = list(dict.fromkeys(entry.axis for entry in entries))
    if axis is not None and axis not in axes:
        raise RankfoldError(f"--axis: there is no {axis!r}; there are: {', '.join(axes)}")
    entries = [entry for entry in entries if axis in (None, entry.axis)]
    if json:
        print_json([entry.as_dict() for entry in entries])
        return
    for one in dict.fromkeys(entry.axis for entry in entries):
        here = [entry for entry in entries if entry.axis == one]
        capabilities = list(here[0].supports)
        table = Table("slug", "what", *capabilities, title=one, title_justify="left", title_style="bold")
        for entry in here:
            marks = ("✓" if entry.supports[name] is True else "·" for name in capabilities)
            table.add_row(entry.slug, entry.title, *marks)
        stdout.print(table)
