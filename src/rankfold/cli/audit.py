"""`rankfold audit` and `rankfold soften`: what an adapter did to its model, and its intruder dimensions scaled down."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    from rankfold.audit.record import Raised
    from rankfold.audit.report import Audit
    from rankfold.train.models import Loaded

_SHOWN = 12  # layers of the table; all are in the page and in the JSON
_COLUMNS = ("layer", "rank", "eff.", "growth", "‖ΔW‖/‖W‖", "intruders", "min m")  # what 80 letters hold


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
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="ADAPTER", help="Another adapter of this model, to compare with. Repeatable."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A text that has nothing to do with the task, to measure forgetting.")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Ask the benign probes, to see whether refusals were lost.")
    ] = True,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep the alarms beside the adapter, for inspect and merge.")
    ] = True,
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
    beside = [_load_beside(loaded, folder) for folder in others or ()]

    from rankfold.audit import record as records
    from rankfold.audit.report import answers
    from rankfold.audit.report import audit as measure
    from rankfold.core.files import write_whole
    from rankfold.train.display import ConsoleDisplay
    from rankfold.train.encode import token_blocks

    display = ConsoleDisplay(stderr)
    other = None if reference is None else load_base(reference, dtype, recipe).model
    blocks = None if text is None else token_blocks(text.read_text("utf-8", errors="replace"), loaded.processor)
    refusals = None
    if probes and answers(loaded.model):
        from rankfold.audit.probing import ask, count

        with display.bar("asking the probes", count()) as advance:
            refusals = ask(loaded.model, loaded.processor, name, advance)
    with display.bar("looking at the weights", len(on_it.deltas)) as advance:
        made = measure(
            loaded.model,
            name,
            reference=other,
            others=beside,
            blocks=blocks,
            refusals=refusals,
            k=components,
            threshold=threshold,
            progress=advance,
        )
    raised = [records.Raised(**vars(alarm)) for alarm in made.alarms]
    if record:
        try:
            records.write(adapter, raised, made.missing)
        except OSError as error:
            say([f"the alarms are not kept beside the adapter: {error}"])
    if html is not None:
        from rankfold.audit.page import page

        write_whole(html, page(made))
    if json:
        print_json(made.as_dict())
    else:
        _show(made, raised, html)
    if fail_on is not None and made.worst in ("HIGH", fail_on):
        raise typer.Exit(1)


def _load_beside(loaded: "Loaded", folder: Path) -> str:
    """Another adapter on the same model, called as its folder is."""
    import rankfold

    name = re.sub(r"[^\w+=@-]+", "-", folder.resolve().name).lstrip("+=@-")[:100] or "other"
    taken = set(rankfold.adapters(loaded.model))
    free = next(name + end for end in ("", *(f"-{i}" for i in range(2, 1000))) if name + end not in taken)
    with stderr.status("loading another adapter"):
        return rankfold.load(loaded.model, folder, free, active=False).name


def _show(made: "Audit", alarms: "Sequence[Raised]", html: Path | None) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from rankfold.audit.page import COLUMNS

    worst_first = sorted(made.rows, key=lambda row: (-row.intruders, -row.frobenius_norm))
    table = Table(*(Column(name, no_wrap=True) for name in _COLUMNS))
    for row in worst_first[:_SHOWN]:
        table.add_row(*(Text(COLUMNS[name][2](row).removeprefix("model.layers.")) for name in _COLUMNS))
    stdout.print(table)
    if len(made.rows) > _SHOWN:
        stdout.print(f"and {len(made.rows) - _SHOWN} more; --html and --json have all")
    for other in dict.fromkeys(name for row in made.rows for name in row.between):
        some = [row.between[other] for row in made.rows if other in row.between]
        left, right, by_left, by_right = (
            sum(getattr(found, side) for found in some) / len(some)
            for side in ("left", "right", "left_chance", "right_chance")
        )
        stdout.print(
            f"overlap with {other} on {len(some)} weights: outputs {left:.2f} ({by_left:.2f} by chance), inputs "
            f"{right:.2f} ({by_right:.2f})",
            highlight=False,
        )
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
    for alarm in alarms[:_SHOWN]:
        stdout.print(Text(str(alarm), style="red" if alarm.level == "HIGH" else "yellow"))
    if len(alarms) > _SHOWN:
        stdout.print(f"and {len(alarms) - _SHOWN} more alarms")
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
