"""`rankfold export` and `rankfold import`: adapters from and to PEFT's file format."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from rankfold.cli._common import (
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
from rankfold.errors import RankfoldError


def register(app: typer.Typer) -> None:
    app.command("export", epilog="Example: rankfold export --model BASE --adapter runs/gsm8k/adapter --output peft")(
        export
    )
    app.command("import", epilog="Example: rankfold import --model BASE --peft peft --output adapter")(import_)


def export(
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", help="Folder for what is written.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="With --format vllm: adapters, or folders of adapters."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Folder of a saved adapter.")] = None,
    format: Annotated[
        Literal["peft", "vllm"],
        typer.Option("--format", help="One PEFT adapter, or any number laid out for vLLM, with a manifest."),
    ] = "peft",
    rank: Annotated[int | None, typer.Option("--rank", help="With --format vllm: the most that a layer has.")] = None,
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
    despite: DespiteOption = None,
) -> None:
    """Write an adapter in PEFT's format, for PEFT, vLLM and what else reads that; or many at once for vLLM.

    For vLLM every adapter becomes a plain LoRA of one rank. manifest.json says what each lost by that, and the command
    that serves them.
    """
    import rankfold
    from rankfold.audit.record import check

    given = [*(folders or ()), *([adapter] if adapter else ())]
    if format == "peft":
        if len(given) != 1 or rank is not None:
            raise RankfoldError("--format peft writes one adapter as it is: give its folder with --adapter, no --rank")
        check(given[0], despite or ())
        loaded = load_base(model, dtype, recipe)
        rankfold.export_peft(loaded.model, output, name=load_adapter(loaded, given[0]).name)
        say([f"PEFT adapter: {output}"])
        return
    from rankfold.core.document import TENSORS
    from rankfold.serve.vllm import MANIFEST, adapter_folders, export_vllm

    check_new(output)
    found = adapter_folders(given)
    for folder in found.values():
        if (folder / TENSORS).is_file():
            check(folder, despite or ())
    loaded = load_base(model, dtype, recipe)
    base = str(Path(model).resolve()) if Path(model).is_dir() else model  # vLLM is started from within the output
    with stderr.status("exporting") as status:
        manifest = export_vllm(loaded.model, given, output, base=base, rank=rank, progress=status.update)
    lossy = [
        f"{one['name']} ({one['method']}): error {one['error']:.2g}"
        for one in manifest["adapters"]
        if one["error"] > 1e-5
    ]
    say(
        [
            f"{len(found)} adapters for vLLM: {output / MANIFEST}",
            *lossy,
            f"cd {quote(str(output))} && {manifest['command']}",
        ]
    )


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
