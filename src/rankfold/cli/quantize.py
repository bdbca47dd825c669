"""`rankfold quantize`: a base model in few bits."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.cli._common import (
    MODEL_HELP,
    DtypeOption,
    JsonOption,
    check_new,
    load_base,
    print_json,
    say,
    stderr,
    stdout,
)
from rankfold.errors import RankfoldError

_EPILOG = (
    "[bold]rtn[/bold]: round to nearest; needs no data.\n\n"
    "[bold]gptq[/bold]: column by column, so that outputs on the calibration text change least.\n\n"
    "[bold]awq[/bold]: weights that large inputs meet are made larger before they are rounded.\n\n"
    "[bold]adadim[/bold]: groups along the inputs or along the outputs, for each layer the better.\n\n"
    "[bold]cbq[/bold]: which way to round is learnt, in two blocks at a time.\n\n"
    "[bold]zeroquant-fp[/bold]: gptq with scales that are powers of two apart, for fp4.\n\n"
    "[bold]pv-tuning[/bold]: codes of codebooks (--scheme 2x8 --group 8), trained on the calibration text.\n\n"
    "[bold]lorc[/bold], [bold]eora[/bold]: a LoRA that makes good what was lost, of the weights or, with the "
    "calibration text, of the outputs. It is saved in OUTPUT/compensation, an adapter as any other.\n\n"
    "[bold]lrec[/bold]: such a LoRA trained on that text to say what the float model says.\n\n"
    "The float model is held in memory until all is done: count it, the packed one beside it, and the calibration "
    "text's hidden states (tokens × width × 4 bytes).\n\n"
    "A run that was stopped goes on where it was when the same command is given again. "
    "The result loads with rankfold.load_quantized, and as the model of every command and recipe.\n\n"
    "Example: rankfold quantize MODEL --scheme int3 --how gptq --calibration wiki.txt --compensate eora --rank 16 "
    "--output model-int3"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(quantize)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", help="New folder for the quantised model.")],
    scheme: Annotated[
        str, typer.Option("--scheme", help="int8, int4, int3, int2, ternary, nf4, fp4, fp8 or, as 2x8, codebooks.")
    ] = "int4",
    how: Annotated[str, typer.Option("--how", help="rtn, gptq, awq, adadim, cbq or another quantiser's slug.")] = "rtn",
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="N|channel|tensor",
            help="Numbers that share a scale, or a code of a codebook.  [default: 64, or 8]",
        ),
    ] = None,
    along: Annotated[
        str, typer.Option("--along", help="Groups run along the inputs (in) or, down a column, the outputs (out).")
    ] = "in",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    double: Annotated[bool, typer.Option("--double", help="Scales in 8 bits themselves, as QLoRA's.")] = False,
    activations: Annotated[
        str | None, typer.Option("--activations", help="Inputs in 8 bits too: int8, fp8 or fp8-e5m2.")
    ] = None,
    compensate: Annotated[str | None, typer.Option("--compensate", help="lorc, eora or lrec.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Of the compensation.  [default: its own]")] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="A text like those that the model will see.")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=2, help="Blocks of 256 tokens of that text.")] = 64,
    form: Annotated[
        str, typer.Option("--format", metavar="rankfold|gptq", help="gptq: files that vLLM and GPTQModel read too.")
    ] = "rankfold",
    dtype: DtypeOption = "float32",
    json: JsonOption = False,
) -> None:
    """Quantise the linear layers of a model, all but the head, and save it."""
    check_new(output)
    if rank is not None and compensate is None:
        raise RankfoldError("--rank is the rank of a compensation: say which, as --compensate eora")
    if form not in ("rankfold", "gptq"):
        raise RankfoldError(f"--format is rankfold or gptq, not {form!r}")

    from pydantic import ValidationError
    from rich.progress import Progress

    import rankfold
    from rankfold.core.targets import find

    try:
        asked = _scheme(
            scheme, group, {"along": along, "symmetric": symmetric, "double": double, "activations": activations}
        )
    except ValidationError as error:
        problems = "; ".join(
            f"--{'scheme' if e['loc'][0] == 'format' else e['loc'][0]}: {e['msg']}" for e in error.errors()
        )
        raise RankfoldError(problems) from None
    rule = rankfold.build(how)
    repair = None if compensate is None else rankfold.build(compensate, **({} if rank is None else {"rank": rank}))
    loaded = load_base(model, dtype, None)
    texts = None if calibration is None else _blocks(calibration, loaded.processor, blocks)
    total = len(find(loaded.model, "all-linear"))
    work = output.parent / f".{output.name}.quantising"
    try:
        with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
            task = bar.add_task("quantising", total=total)
            training = bar.add_task("training", total=None, visible=False)
            report = rankfold.quantize(
                loaded.model,
                asked,
                rule,
                calibration=texts,
                compensate=repair,
                progress=lambda path: bar.advance(task),
                trained=lambda done, of: bar.update(training, completed=done, total=of, visible=True),
                work=work,
            )
        with stderr.status("saving"):
            rankfold.save_quantized(loaded.model, output, loaded.processor, format=form)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        if work.exists():
            say([f"the blocks that are done are kept in {work}: the same command goes on after them"])
        raise
    shutil.rmtree(work, ignore_errors=True)
    error = sum(one.error for one in report.values()) / len(report)
    if json:
        from dataclasses import asdict

        layers = {path: asdict(one) for path, one in report.items()}
        print_json({"model": str(output), "scheme": asked.model_dump(), "error": error, "layers": layers})
        return

    from rich.table import Table

    table = Table("layer", "bits", "error ‖W − Ŵ‖ / ‖W‖", *(["with compensation"] if repair else []))
    for path, one in report.items():
        left = [] if one.left is None else [f"{one.left:.4f}"]
        table.add_row(path, f"{one.bits:.2f}", f"{one.error:.4f}", *left)
    stdout.print(table)
    say([f"quantised model: {output}", f"mean error: {error:.4f}"])


def _scheme(scheme: str, group: str | None, more: dict[str, Any]) -> Any:
    """`--scheme` as a Scheme or, of the form 2x8, Codebooks: tables, and bits of a code."""
    from rankfold.core.codebooks import Codebooks
    from rankfold.core.packed import Scheme

    books, _, bits = scheme.partition("x")
    if books.isdigit() and bits.isdigit():
        if more != {"along": "in", "symmetric": False, "double": False, "activations": None}:
            raise RankfoldError("codebooks have no --along, --symmetric, --double or --activations")
        return Codebooks.model_validate({"books": int(books), "bits": int(bits), "width": group or 8})
    width: Any = int(group) if group is not None and group.isdigit() else group or 64
    return Scheme.model_validate({"format": scheme, "group": width, **more})


def _blocks(path: Path, tokenizer: Any, limit: int) -> list[Any]:
    from rankfold.train.encode import token_blocks

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RankfoldError(f"--calibration: cannot read {path}: {error}") from None
    return [{"input_ids": block[None]} for block in token_blocks(text, tokenizer, 256, limit)]
