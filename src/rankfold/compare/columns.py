"""What the rows of data mean, by the names of their columns."""

from rankfold.errors import RankfoldError
from rankfold.train.recipe import COLUMNS, Data, Format
from rankfold.train.rows import read_rows

# The more telling ones first: rows of `text` and `label` are not there to be continued.
_BY_COLUMNS: tuple[Format, ...] = ("image-classification", "classification", "prompt-completion", "text")


def format_of(place: str) -> Format:
    """The format whose columns the data has. Raises RankfoldError where none fits."""
    data = Data.model_validate({"path": place, "format": "text"})
    columns = set(read_rows(data, place, data.split, "--data").column_names)
    if "messages" in columns:
        return "chat"
    for name in _BY_COLUMNS:
        if set(COLUMNS[name][0]) <= columns:
            return name
    there = ", ".join(sorted(columns))
    raise RankfoldError(
        f"--data: the columns {there} do not say what a row means: give --format, and what each field is, as "
        "--set recipe.data.columns.prompt=question"
    )
