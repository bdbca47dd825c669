"""`rankfold merge`: an adapter written into its base model."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli._common import (
    AdapterOption,
    DespiteOption,
    DtypeOption,
    ModelOption,
    RecipeOption,
    check_new,
    load_adapter,
    load_base,
    say,
    stderr,
)


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold merge --model BASE --adapter runs/gsm8k/adapter --output merged")(merge)


def merge(
    model: ModelOption,
    adapter: AdapterOption,
    output: Annotated[Path, typer.Option("--output", help="New folder for the merged model.")],
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
    despite: DespiteOption = None,
) -> None:
    """Write an adapter into its base model and save the result as an ordinary Transformers model.

    What ends in few bits (PEQA on a packed base, L4Q) is saved packed, for rankfold.load_quantized or from_pretrained.
    """
    import rankfold
    from rankfold.audit.record import check
    from rankfold.core.packed import PackedLinear
    from rankfold.train.models import save_directory

    check_new(output)
    check(adapter, despite or ())
    loaded = load_base(model, dtype, recipe)
    name = load_adapter(loaded, adapter).name
    with stderr.status("merging and saving"):
        rankfold.merge(loaded.model, name)
        if any(isinstance(layer, PackedLinear) for layer in loaded.model.modules()):
            rankfold.save_quantized(loaded.model, output, loaded.processor)
        else:
            save_directory(loaded.model, loaded.processor, output)
    say([f"merged model: {output}"])
