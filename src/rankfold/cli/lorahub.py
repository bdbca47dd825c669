"""`rankfold lorahub`: adapters mixed for a new task by a few of its examples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankfold.cli._common import JsonOption, SetOption, check_new, print_json, quiet_loading, say, stderr, stdout

if TYPE_CHECKING:
    from rankfold.compose.lorahub import Search


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold lorahub task.yaml runs/*/adapter --examples 5 --output mixed")(lorahub)


def lorahub(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe that names the model and the task's data.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of saved adapters, or hub ids.")],
    output: Annotated[Path, typer.Option("--output", help="New folder for the mixture.")],
    examples: Annotated[int, typer.Option("--examples", min=1, help="So many training rows of the recipe.")] = 5,
    budget: Annotated[int, typer.Option("--budget", min=3, help="How often their loss is measured.")] = 40,
    penalty: Annotated[float, typer.Option("--penalty", min=0, help="Of the mean size of a weight.")] = 0.05,
    most: Annotated[int, typer.Option("--most", min=1, help="Draw so many adapters if there are more.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Mix adapters of different bases all the same.")] = False,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Search the weights of a mixture of adapters on a few examples of a new task, without gradients (LoraHub)."""
    check_new(output)

    import numpy as np
    from torch.utils.data import DataLoader

    from rankfold.compose.lorahub import lorahub as search_weights
    from rankfold.train.display import ConsoleDisplay
    from rankfold.train.inputs import load_inputs
    from rankfold.train.processes import processes
    from rankfold.train.recipe_file import read_recipe

    run = read_recipe(recipe, set_ or ())
    quiet_loading()
    display = ConsoleDisplay(stderr)
    inputs = load_inputs(run, display)
    order = np.random.default_rng(run.seed).permutation(len(inputs.data.train))[:examples]
    rows = [inputs.data.train[int(i)] for i in order]
    batches = DataLoader(rows, run.batch.eval_size or run.batch.size, collate_fn=inputs.data.collate)  # type: ignore[arg-type]
    with display.bar("trying weights", budget) as advance:
        _, search = search_weights(
            adapters,
            batches,
            output,
            model=inputs.model.to(processes().device),
            budget=budget,
            penalty=penalty,
            most=most,
            force=force,
            seed=run.seed,
            progress=advance,
        )
    weights = dict(zip((adapters[i] for i in search.chosen), search.best.weights, strict=True))
    if json:
        losses = {"base": search.trials[0].loss, "mixture": search.best.loss}
        print_json({"adapter": str(output), "weights": weights, "loss": losses, "trials": len(search.trials)})
        return
    _show(weights, search)
    say([f"mixed adapter: {output}", f"held-out score: rankfold eval {recipe} --adapter {output}"])


def _show(weights: dict[str, float], search: "Search") -> None:
    from rich.table import Table

    table = Table("adapter", "weight")
    for adapter, weight in sorted(weights.items(), key=lambda one: -abs(one[1])):
        table.add_row(adapter, f"{weight:+.3f}")
    stdout.print(table)
    first, best = search.trials[0], search.best
    stdout.print(
        f"loss on the examples {first.loss:.4f} → {best.loss:.4f}, in {len(search.trials)} trials", highlight=False
    )
