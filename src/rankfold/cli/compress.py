"""`rankfold compress`: a saved adapter in fewer bits."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rankfold.cli._common import JsonOption, check_new, print_json, say, stderr, stdout


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: rankfold compress runs/gsm8k/adapter --how compeft --density 0.1 --output runs/gsm8k/small"
    )(compress)


def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter, or its hub id.")],
    how: Annotated[
        Literal["compeft", "onebit"],
        typer.Option("--how", help="compeft: signs of the largest numbers and one scale; onebit: few levels a matrix."),
    ],
    output: Annotated[Path, typer.Option("--output", help="New folder for the compressed adapter.")],
    density: Annotated[
        float | None, typer.Option("--density", help="compeft: share of the numbers kept.  [default: 0.2]")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="compeft: what the scale is multiplied by.  [default: 1]")
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="onebit: bits a number.  [default: as it was trained, else 1]")
    ] = None,
    by_tensor: Annotated[
        bool, typer.Option("--by-tensor", help="compeft: take the share and the scale of each tensor by itself.")
    ] = False,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Code the difference to where training started, vectors too.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Store an adapter's trained matrices in few bits. Loads no model; the result loads like any other adapter."""
    check_new(output)

    from rankfold.compose.compress import compress as run
    from rankfold.core.component import build

    given = {"density": density, "alpha": alpha, "bits": bits}
    flags = {"by_tensor": by_tensor, "from_start": from_start}
    options = {name: value for name, value in given.items() if value is not None} | {n: True for n in flags if flags[n]}
    with stderr.status("compressing"):
        _, report = run(adapter, build(how, **options), output)
    if json:
        from dataclasses import asdict

        print_json({"adapter": str(output), **asdict(report), "ratio": report.ratio})
        return

    from rich.table import Table

    table = Table("layer", "kept", "error ‖ΔW − ΔW′‖ / ‖ΔW‖")
    for site, layer in report.layers.items():
        table.add_row(site, f"{layer.kept:.1%}", f"{layer.error:.4f}")
    stdout.print(table)
    say(
        [
            f"compressed adapter: {output}",
            f"bytes: {report.before:,} → {report.after:,}, {report.code:,} of them codes of {report.coded:,} numbers",
            f"smaller than 16 bits a number: {report.ratio:.1f} ×",
        ]
    )
