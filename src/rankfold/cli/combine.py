"""`rankfold combine`: several saved adapters of one base model as one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli._common import JsonOption, check_new, print_json, say, stderr, stdout, weight_list

if TYPE_CHECKING:
    from rankfold.compose._merge import Combined

_EPILOG = (
    "[bold]linear[/bold] (task-arithmetic): the weighted sum, exact; its rank is the sum of all ranks.\n\n"
    "[bold]svd[/bold] (svd-merge): the best LoRA of one rank for that sum. A good first choice.\n\n"
    "[bold]ties[/bold]: keeps each adapter's largest changes, and where adapters disagree on a sign, those of the "
    "stronger side. --set density=0.2 --set scale=1.\n\n"
    "[bold]dare[/bold]: drops changes at random and rescales the rest. --set drop=0.9 --set rule=sum, or ties.\n\n"
    "[bold]lego[/bold] (lora-lego): clusters the rank-1 parts of all adapters, and keeps a centre of each cluster.\n\n"
    "Others: rankfold methods --axis compose.\n\n"
    "With --space delta, the default, the products B A are merged; with factors, B and A apart, as PEFT does: quick, "
    "but the result has products of one adapter's B with another's A, and all ranks must be equal.\n\n"
    "The table: [bold]read[/bold] is what is lost in seeing an adapter's change as a product B A (a bias, for one), "
    "[bold]cut[/bold] what is lost in cutting the merged change to its rank, [bold]error[/bold] the distance from the "
    "plain weighted sum; all relative.\n\n"
    "Example: rankfold combine runs/gsm8k/adapter runs/orca/adapter --how ties --weights 0.7,0.3 --output merged"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(combine)


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of saved adapters, or hub ids.")],
    output: Annotated[Path, typer.Option("--output", help="New folder for the combined adapter.")],
    how: Annotated[str, typer.Option("--how", help="linear, svd, ties, dare, lego, or another merge's slug.")] = "svd",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="One each, negative to take away. Default: the rule's, most often 1/N.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of the result. Default: the largest of the adapters'.")
    ] = None,
    space: Annotated[str | None, typer.Option("--space", help="delta or factors; the same as --set space=.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a hyperparameter of the rule. Repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub id of the base, for changes that depend on it (DoRA, IA3, ...)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For rules that draw at random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Also of different bases; the new adapter says so.")] = False,
    json: JsonOption = False,
) -> None:
    """Combine adapters of one base model, of any methods and ranks, into one LoRA, layer by layer. Loads no model."""
    check_new(output)

    from rich.progress import Progress

    import rankfold
    from rankfold.compose._merge import rule_of
    from rankfold.core.checkpoint import read
    from rankfold.train.recipe_file import apply_override

    values: dict[str, Any] = {} if space is None else {"space": space}
    for change in changes or ():
        apply_override(values, change)
    rule = rule_of(how, **values)
    layers = {site for adapter in adapters for site in read(adapter).document.sites}
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("combining", total=(1 + rule.surveys) * len(layers))
        _, report = rankfold.combine(
            adapters, rule, weight_list(weights), output, rank=rank, model=model, force=force, seed=seed,
            progress=lambda: bar.advance(task),
        )  # fmt: skip
    forced = read(output).document.forced
    if json:
        from dataclasses import asdict

        print_json(
            {
                "adapter": str(output),
                "how": rule.describe(),
                "forced": forced,
                "layers": {site: asdict(layer) for site, layer in report.items()},
            }
        )
        return
    _show(report)
    worst = max(report.values(), key=lambda layer: layer.cut)
    say([f"combined adapter: {output}", f"largest cut: {worst.cut:.4f}", *([f"forced: {forced}"] if forced else [])])


def _show(report: "dict[str, Combined]") -> None:
    from rich.table import Table

    table = Table("layer", "ranks", "read", "cut", "error")
    for site, layer in report.items():
        ranks = f"{', '.join(map(str, layer.before))} → {layer.rank}"
        table.add_row(site, ranks, f"{layer.read:.4f}", f"{layer.cut:.4f}", f"{layer.error:.4f}")
    stdout.print(table)
