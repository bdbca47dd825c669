"""`rankfold methods`: every registered component, and what each method can do."""

from typing import TYPE_CHECKING, Annotated

import typer

from rankfold.cli._common import JsonOption, print_json, stdout
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.core.registry import Entry


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold methods --axis deltas")(methods)


def methods(
    axis: Annotated[str | None, typer.Option("--axis", help="Only this axis: deltas, inits, ...")] = None,
    json: JsonOption = False,
) -> None:
    """List the methods, inits and callbacks there are, with what each supports."""
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
        _show(one, [entry for entry in entries if entry.axis == one])


def _show(axis: str, entries: "list[Entry]") -> None:
    """One axis: what each component is, then the matrix of what each can do and why it cannot do the rest."""
    from rich.table import Table

    stdout.print(f"[bold]{axis}[/bold]")
    names = Table.grid(padding=(0, 2))
    for entry in entries:
        names.add_row(entry.slug, f"{entry.title} ({entry.source})")
    stdout.print(names)
    capabilities = list(entries[0].supports)
    if capabilities:
        matrix = Table("", *capabilities, box=None, padding=(0, 1), collapse_padding=True)
        for entry in entries:
            matrix.add_row(entry.slug, *("✓" if entry.supports[name] is True else "·" for name in capabilities))
        stdout.print(matrix)
        reasons: dict[str, list[str]] = {}
        for name in capabilities:
            for entry in entries:
                if entry.supports[name] is not True:
                    reasons.setdefault(f"{name}: {entry.supports[name]}", []).append(entry.slug)
        for reason, slugs in reasons.items():
            stdout.print(f"  · {reason} ({', '.join(slugs)})")
    stdout.print()
