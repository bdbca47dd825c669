"""A comparison as a table, for the terminal while it runs and afterwards, and as CSV. Light: no torch."""

import csv
import io
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankfold.compare.result import FIGURES, Comparison, Contender, Figure


def table(contenders: Sequence[Contender], doing: Mapping[str, str], metric: str, console: Console) -> Table:
    """A line for each contender: what it is doing, the rate it found, and every figure as mean ± deviation.

    Figures that nobody has are left out, and the last ones where the console is too narrow for all.
    """
    names = [name for name, f in FIGURES.items() if name == "quality" or any(c.values(f) for c in contenders)]
    left_out: list[str] = []
    while True:
        made = _table(contenders, doing, metric, names)
        if left_out:
            made.caption = f"in the report besides: {', '.join(FIGURES[name].title for name in reversed(left_out))}"
        unbounded = console.options.update(width=10_000)  # else it measures what it would be squeezed to
        if len(names) == 1 or console.measure(made, options=unbounded).maximum <= console.width:
            return made
        left_out.append(names.pop())


def _table(contenders: Sequence[Contender], doing: Mapping[str, str], metric: str, names: Sequence[str]) -> Table:
    made = Table("", "", "rate", *(metric if name == "quality" else FIGURES[name].title for name in names))
    for contender in contenders:
        state = doing.get(contender.name, "failed" if contender.failed else f"{len(contender.runs)} seeds")
        red = contender.failed and bool(contender.failures)
        made.add_row(
            Text(contender.name),  # no markup in what a user wrote
            Text(state, style="red" if red else "dim"),
            "" if contender.lr is None else f"{contender.lr:.2g}",
            *(shown(contender, FIGURES[name]) for name in names),
        )
    return made


def shown(contender: Contender, figure: Figure) -> str:
    """Mean ± standard deviation over the seeds; the mean alone where there is one seed, or no difference."""
    found = contender.summary(figure)
    if found is None:
        return ""
    mean, deviation = found
    return figure.show(mean) + (f" ± {figure.show(deviation).lstrip('+')}" if deviation else "")


def as_csv(comparison: Comparison) -> str:
    """A line for each run, and for each failure, in plain numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["contender", "axis", "seed", "rate", *FIGURES, "loss", "steps", "seconds", "failure"])
    for contender in comparison.contenders:
        for run in contender.runs:
            figures = ["" if (value := figure.of(run)) is None else value for figure in FIGURES.values()]
            after = [run.after["loss"], run.steps, run.seconds]
            writer.writerow([contender.name, contender.axis, run.seed, run.lr, *figures, *after, ""])
        for failure in contender.failures:
            seed = "" if failure.seed is None else failure.seed
            blank = [""] * (len(FIGURES) + 4)
            writer.writerow([contender.name, contender.axis, seed, *blank, failure.reason])
    return text.getvalue()
