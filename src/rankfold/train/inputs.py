"""The model and the data of a recipe, loaded: what `rankfold train` and `rankfold eval` both begin with."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfold.train.data import Prepared, class_names, prepare
from rankfold.train.display import Display
from rankfold.train.models import Loaded, load_model
from rankfold.train.processes import processes
from rankfold.train.recipe import Recipe
from rankfold.train.rows import read_split


@dataclass(frozen=True)
class Inputs:
    """`recipe` is the one asked for, with what model and data decided filled in: the class names, and the modules
    that the model's checkpoint lacks. `processor` is the tokenizer or the image processor."""

    recipe: Recipe
    model: nn.Module
    processor: Any
    data: Prepared


def load_inputs(recipe: Recipe, display: Display, loaded: Loaded | None = None) -> Inputs:
    """Load what the recipe names, but for the model where that is there already.

    Raises RankfoldError, naming the key, where something is missing or does not fit.
    """
    first = processes().main_process_first  # it fills the caches (data sets, converted models) that the others read
    with display.phase("reading the data"), first():
        rows = read_split(recipe.data, recipe.seed)
        labels = class_names(recipe.data, *rows) if recipe.task.endswith("classification") else None
    with display.phase("loading the model"), first():
        if loaded is None:
            loaded = load_model(
                recipe.model, recipe.task, labels=labels, image_size=recipe.data.image_size, seed=recipe.seed
            )
    in_full = loaded.new_modules if recipe.modules_to_save is None else recipe.modules_to_save
    data = recipe.data.model_copy(update={"labels": labels})
    recipe = recipe.model_copy(update={"data": data, "modules_to_save": in_full})
    with display.phase("encoding the data"):
        prepared = prepare(recipe, rows, loaded.processor, labels)
    return Inputs(recipe, loaded.model, loaded.processor, prepared)
