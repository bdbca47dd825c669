"""What several commands share: their options, their output, and a base model with an adapter on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.core.adapter import Adapter
    from rankfold.train.models import Loaded

MODEL_HELP = "Base model: hub id, directory, .gguf file, or package:DISTRIBUTION/PATH."
ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
AdapterOption = Annotated[Path, typer.Option("--adapter", help="Folder of a saved adapter.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16 or float16.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe of the run (recipe.yaml), for a model with a classification head."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, as optimizer.lr=1e-3. Repeatable."),
]
DespiteOption = Annotated[
    list[str] | None,
    typer.Option("--despite", metavar="ALARM", help="Go on in spite of this HIGH alarm of its audit. Repeatable."),
]

# What people read goes to standard error, what machines read (and generated text) to standard output.
stderr = Console(stderr=True)
stdout = Console()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def weight_list(weights: str | None) -> list[float] | None:
    """The numbers of an option --weights."""
    try:
        return None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise RankfoldError(f"--weights {weights}: expected numbers with commas between them, as 0.7,0.3") from None


def check_new(output: Path) -> None:
    """Refuse an output folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RankfoldError(f"--output: {output} is not empty")


def quiet_loading() -> None:
    """No bars of Transformers' own beside ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_base(model: str, dtype: str, recipe: Path | None) -> "Loaded":
    """The base model: for the task of a recipe, else for the kind of generation that it can do."""
    from rankfold.train.models import load_model
    from rankfold.train.recipe import Model
    from rankfold.train.recipe_file import read_recipe, validate_part

    quiet_loading()
    spec = validate_part(Model, {"path": model, "dtype": dtype}, "--model")
    if recipe is None:
        with stderr.status("loading the model"):
            return load_model(spec, None)
    run = read_recipe(recipe)
    with stderr.status("loading the model"):
        return load_model(spec, run.task, labels=run.data.labels, image_size=run.data.image_size, seed=run.seed)


def load_adapter(loaded: "Loaded", folder: Path) -> "Adapter":
    """Load the adapter in `folder` onto the model, under the name it was saved with."""
    import rankfold

    with stderr.status("loading the adapter"):
        return rankfold.load(loaded.model, folder)


def say(lines: Sequence[str]) -> None:
    """Lines for a person."""
    for line in lines:
        stderr.print(line, highlight=False, soft_wrap=True)
