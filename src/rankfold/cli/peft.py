"""`rankfold export` and `rankfold import`: adapters from and to PEFT's file format."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli._common import (
    AdapterOption,
    DespiteOption,
    DtypeOption,
    ModelOption,
    RecipeOption,
    load_adapter,
    load_base,
    say,
)


def register(app: typer.Typer) -> None:
    app.command("export", epilog="Example: rankfold export --model BASE --adapter runs/gsm8k/adapter --output peft")(
        export
    )
    app.command("import", epilog="Example: rankfold import --model BASE --peft peft --output adapter")(import_)


def export(
    model: ModelOption,
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option("--output", help="Folder for the PEFT adapter.")],
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
    despite: DespiteOption = None,
) -> None:
    """Write an adapter in PEFT's format, for PEFT, vLLM and what else reads that."""
    import rankfold
    from rankfold.audit.record import check

    check(adapter, despite or ())
    loaded = load_base(model, dtype, recipe)
    rankfold.export_peft(loaded.model, output, name=load_adapter(loaded, adapter).name)
    say([f"PEFT adapter: {output}"])


def import_(
    model: ModelOption,
    peft: Annotated[Path, typer.Option("--peft", help="Folder of a PEFT adapter.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the adapter.")],
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")] = "default",
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
) -> None:
    """Read a PEFT adapter and write it as one of Rankfold's."""
    import rankfold

    loaded = load_base(model, dtype, recipe)
    rankfold.import_peft(loaded.model, peft, name=name)
    rankfold.save(loaded.model, output, name=name)
    say([f"adapter: {output}"])
