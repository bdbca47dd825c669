"""`rankfold audit` and `rankfold soften`: what an adapter did to its model, and its intruder dimensions scaled down."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rankfold.cli._common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    RecipeOption,
    check_new,
    load_adapter,
    load_base,
    print_json,
    say,
    stderr,
    stdout,
)
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.audit.report import Audit

_SHOWN = 12  # layers of the table; all are in the page and in the JSON


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: rankfold audit runs/gsm8k/adapter --model BASE --text general.txt --html audit.html "
        "--fail-on HIGH"
    )(audit)
    app.command(epilog="Example: rankfold soften runs/gsm8k/adapter --model BASE --strength 0.5 --output softened")(
        soften
    )


Components = Annotated[int, typer.Option("--components", min=1, help="Leading components looked at for intruders.")]
Threshold = Annotated[
    float, typer.Option("--threshold", min=0, max=1, help="Resemblance below which a component is an intruder.")
]


def audit(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")],
    model: ModelOption,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The same model tuned in full (as --model), to compare every layer with."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A text that has nothing to do with the task, to measure forgetting.")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Ask the benign probes, to see whether refusals were lost.")
    ] = True,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
    json: JsonOption = False,
    fail_on: Annotated[
        Literal["WARN", "HIGH"] | None, typer.Option("--fail-on", help="Exit with 1 if an alarm of this level fires.")
    ] = None,
    components: Components = 10,
    threshold: Threshold = 0.5,
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
) -> None:
    """Measure what an adapter did, and raise alarms: spectra, intruders, entanglement, forgetting, lost refusals."""
    if text is not None and not text.is_file():
        raise RankfoldError(f"--text: no such file: {text}")
    loaded = load_base(model, dtype, recipe)
    on_it = load_adapter(loaded, adapter)
    name = on_it.name

    from rankfold.audit.forgetting import blocks_of
    from rankfold.audit.report import audit as measure
    from rankfold.core.files import write_whole
    from rankfold.train.display import ConsoleDisplay

    display = ConsoleDisplay(stderr)
    other = None if reference is None else load_base(reference, dtype, recipe).model
    blocks = None if text is None else blocks_of(text.read_text("utf-8", errors="replace"), loaded.processor)
    refusals = None
    if probes and _answers(loaded.model):
        from rankfold.audit.probing import ask, count

        with display.bar("asking the probes", count()) as advance:
            refusals = ask(loaded.model, loaded.processor, name, advance)
    with display.bar("looking at the weights", len(on_it.deltas)) as advance:
        made = measure(
            loaded.model,
            name,
            reference=other,
            blocks=blocks,
            refusals=refusals,
            k=components,
            threshold=threshold,
            progress=advance,
        )
    if html is not None:
        from rankfold.audit.page import page

        write_whole(html, page(made))
    if json:
        print_json(made.as_dict())
    else:
        _show(made, html)
    if fail_on is not None and made.worst in ("HIGH", fail_on):
        raise typer.Exit(1)


def _answers(model: Any) -> bool:
    """Whether the model continues a text, so that it can be asked something."""
    return bool(getattr(model, "can_generate", bool)()) and not model.config.is_encoder_decoder


def _show(made: "Audit", html: Path | None) -> None:
    from rich.table import Table

    from rankfold.audit.page import COLUMNS

    worst_first = sorted(made.rows, key=lambda row: (-row.intruders, -row.frobenius_norm))
    table = Table(*COLUMNS)
    for row in worst_first[:_SHOWN]:
        table.add_row(*(show(row) for *_, show in COLUMNS.values()))
    stdout.print(table)
    if len(made.rows) > _SHOWN:
        stdout.print(f"and {len(made.rows) - _SHOWN} more; --html and --json have all")
    if made.forgetting is not None:
        f = made.forgetting
        ratio = f"perplexity × {f.perplexity_ratio:.3f}"
        stdout.print(
            f"forgetting {f.loss:+.4f} nats a token [{f.low:+.4f}, {f.high:+.4f}], {ratio}, "
            f"drift {f.drift:.4f}, same first token {f.agreement:.1%}, over {f.tokens:,} tokens",
            highlight=False,
        )
    for what, found in (("protected", made.protected), ("harmless", made.harmless)):
        if found is not None:
            stdout.print(
                f"{what} probes refused: {found.before} before, {found.after} after, of {found.count}; a refusal's "
                f"opening {found.opening:+.2f} nats",
                highlight=False,
            )
    for what, why in made.missing.items():
        stdout.print(f"[dim]not measured: {what} ({why})[/dim]", highlight=False)
    for alarm in made.alarms[:_SHOWN]:
        colour = "red" if alarm.level == "HIGH" else "yellow"
        beyond = f"{alarm.value:.4g}, over {alarm.threshold:g}"
        stdout.print(f"[{colour}]{alarm.level}[/{colour}] {alarm.name} at {alarm.where}: {beyond}", highlight=False)
    if len(made.alarms) > _SHOWN:
        stdout.print(f"and {len(made.alarms) - _SHOWN} more alarms")
    if not made.alarms:
        stdout.print("no alarm")
    if html is not None:
        say([f"report: {html}"])


def soften(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")],
    model: ModelOption,
    strength: Annotated[
        float, typer.Option("--strength", min=0, max=1, help="Factor of each intruder: 1 changes nothing.")
    ],
    output: Annotated[Path, typer.Option("--output", help="New folder for the adapter that it makes.")],
    components: Components = 10,
    threshold: Threshold = 0.5,
    dtype: DtypeOption = "float32",
    recipe: RecipeOption = None,
) -> None:
    """Scale the intruder dimensions of an adapter down, and save the result as a LoRA: it often forgets less."""
    import rankfold
    from rankfold.audit.report import soften as make

    check_new(output)
    loaded = load_base(model, dtype, recipe)
    name = load_adapter(loaded, adapter).name
    with stderr.status("looking for intruders"):
        made, counts = make(loaded.model, name, strength, k=components, threshold=threshold)
    rankfold.save(loaded.model, output, name=made.name)
    where = f"{len(counts)} of {len(made.deltas)} weights"
    say([f"{sum(counts.values())} intruders in {where} scaled by {strength:g}: {output}"])
