"""A comparison as one HTML file: who is best and whether that is more than chance, fronts, curves, layers, searches."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankfold.compare.result import FIGURES, Comparison, Contender, Figure, show_bytes, show_count, show_seconds
from rankfold.compare.table import shown
from rankfold.core.files import write_whole
from rankfold.core.page import (
    MARKERS,
    SERIES,
    SOFT,
    Cell,
    cards,
    document,
    escape,
    figure,
    heat_maps,
    paragraph,
    table,
    themed,
    tip,
)

_QUALITY = FIGURES["quality"]
_COSTS = {"parameters": "trained parameters", "memory": "peak memory", "step": "time of a step", "forgetting": ""}
_MAPS = 8  # contenders whose layers are drawn


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the report to `path`, whole or not at all."""
    return write_whole(path, page(comparison))


def page(made: Comparison) -> str:
    """The report as HTML."""
    looks = _looks(made)
    ran = [contender for contender in made.ranked() if not contender.failed]
    rows = ", ".join(f"{count:,} {what}" for what, count in made.rows.items())
    parts = [
        f"<h1>{escape(made.title)}</h1>",
        paragraph(
            f"{len(made.contenders)} contenders, each trained on the same rows in the same order: {made.model} on "
            f"{made.data} ({made.task}; rows: {rows}). {_budget(made)} {_seeds(made)} Finished {_when(made.finished)}.",
            "about",
        ),
    ]
    if ran:
        parts += [_verdict(made, ran), cards(_best(made, ran)), "<h2>Summary</h2>", _summary(made, looks)]
    parts += [*_failures(made, looks), *(_plots(made, ran, looks) if ran else [])]
    parts += [*_searches(made, looks), *_runs(made, looks), *_how(made)]
    return document(made.title, parts)


def _looks(made: Comparison) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each contender, the same everywhere."""
    return {
        contender.name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)])
        for i, contender in enumerate(made.contenders)
    }


# ---- what it comes to


def _budget(made: Comparison) -> str:
    units = {"parameters": lambda n: f"{show_count(n)} trained parameters at most", "memory": show_bytes}
    parts = [units.get(key, lambda n, key=key: f"{n:g} {key}")(value) for key, value in made.budget.items()]
    return f"Budget of each: {', '.join(parts)}." if parts else ""


def _seeds(made: Comparison) -> str:
    if len(made.seeds) == 1:
        return f"One seed ({made.seeds[0]})."
    return f"Seeds {', '.join(map(str, made.seeds))}; ± is the standard deviation over them."


def _when(moment: str) -> str:
    """To the minute, and without the T of ISO 8601."""
    return moment.replace("T", " ")[:16] + (" UTC" if moment.endswith(("+00:00", "Z")) else "")


def _apart(first: Contender, other: Contender) -> bool | None:
    """Whether the qualities differ by more than seeds do: by more than √(s₁² + s₂²). None for a single run."""
    if min(len(first.runs), len(other.runs)) < 2:
        return None
    (one, s1), (two, s2) = _mean(first, _QUALITY), _mean(other, _QUALITY)
    return abs(one - two) > math.hypot(s1, s2)


def _mean(contender: Contender, of: Figure) -> tuple[float, float]:
    found = contender.summary(of)
    assert found is not None  # of the quality of one that ran, or asked before
    return found


def _verdict(made: Comparison, ran: Sequence[Contender]) -> str:
    best, rest = ran[0], ran[1:]
    text = f"{best.name} has the best {made.metric}, {_shown(best, _QUALITY)}."
    near = [other.name for other in rest if _apart(best, other) is False]
    unknown = [other.name for other in rest if _apart(best, other) is None]
    if near:
        text += (
            f" By no more than the seeds differ among themselves: {', '.join(near)} "
            f"{'is' if len(near) == 1 else 'are'} not to be told from it by these runs."
        )
    elif rest and not unknown:
        text += " Its distance to every other is larger than the spread over the seeds."
    if unknown:
        text += (
            f" With a single run nothing is known about the spread: no difference to {', '.join(unknown)} should be "
            "believed without more seeds."
        )
    return paragraph(text)


def _best(made: Comparison, ran: Sequence[Contender]) -> list[tuple[str, str, str]]:
    def card(contender: Contender, of: Figure, what: str) -> tuple[str, str, str]:
        mean, _, spread = _shown(contender, of).partition(" ± ")
        return mean, f"{what}: {contender.name}" + (f" (±\u00a0{spread})" if spread else ""), ""

    found = [card(ran[0], _QUALITY, f"best {made.metric}")]
    for key in ("parameters", "memory", "step", "forgetting"):
        known = [contender for contender in ran if contender.summary(FIGURES[key]) is not None]
        if len(known) > 1 and len(said := {_shown(contender, FIGURES[key]) for contender in known}) == 1:
            found.append((said.pop(), f"{_COSTS[key] or key}: the same for all", ""))
        elif known:
            least = min(known, key=lambda contender: _mean(contender, FIGURES[key])[0])
            found.append(card(least, FIGURES[key], f"least {_COSTS[key] or key}"))
    return found


def _shown(contender: Contender, of: Figure) -> str:
    return shown(contender, of) or "–"


def _cell(contender: Contender, of: Figure) -> Cell:
    found = contender.summary(of)
    mean, _, spread = _shown(contender, of).partition(" ± ")
    return Cell(mean, None if found is None else found[0], f"± {spread}" if spread else "")


def _name(contender: Contender, looks: dict[str, tuple[str, str]]) -> Cell:
    return Cell(contender.name, dot=looks[contender.name][0])


def _summary(made: Comparison, looks: dict[str, tuple[str, str]]) -> str:
    better = "more" if made.higher_is_better else "less"
    head = [
        ("method", "a contender"),
        (made.metric, f"{_QUALITY.definition}; {better} is better"),
        ("to the best", f"difference of the mean {made.metric}; in brackets where seeds differ as much"),
        *((of.title, of.definition) for key, of in FIGURES.items() if key != "quality"),
        ("learning rate", "of the judged runs"),
        ("runs", "finished, of those begun"),
    ]
    rows, ranked = [], made.ranked()
    for contender in ranked:
        runs = Cell(f"{len(contender.runs)} of {len(contender.runs) + len(contender.failures)}", len(contender.runs))
        lr = Cell("–") if contender.lr is None else Cell(f"{contender.lr:.3g}", contender.lr)
        if contender.failed:
            cells = [Cell("failed", level="HIGH"), *[Cell("–") for _ in FIGURES]]
        else:
            difference = _mean(contender, _QUALITY)[0] - _mean(ranked[0], _QUALITY)[0]
            text = f"{difference:+.4f}" if contender is not ranked[0] else "best"
            cells = [
                _cell(contender, _QUALITY),
                Cell(f"({text})" if difference and not _apart(contender, ranked[0]) else text, difference),
                *(_cell(contender, of) for key, of in FIGURES.items() if key != "quality"),
            ]
        rows.append([_name(contender, looks), *cells, lr, runs])
    note = (
        "A difference in brackets is within the spread: no larger than √(s₁² + s₂²) of the two standard deviations, or "
        "from single runs. A click on a column sorts by it; – was not measured, the table of runs says why."
    )
    return table(head, rows) + paragraph(note, "note")


def _failures(made: Comparison, looks: dict[str, tuple[str, str]]) -> list[str]:
    rows = [
        [_name(contender, looks), Cell("before any run" if failure.seed is None else f"seed {failure.seed}"), failure]
        for contender in made.contenders
        for failure in contender.failures
    ]
    if not rows:
        return []
    parts = ["<h2>What did not finish</h2>", paragraph("The others went on.", "note")]
    for name, where, failure in rows:
        dot = f'<i class="dot" style="background: {themed(name.dot)}"></i>'
        parts.append(f"<p>{dot}{escape(f'{name.text}, {where.text}')}</p><pre>{escape(failure.reason)}</pre>")
    return parts


# ---- plots


def front(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """The places of the points (cost, quality) that no other one beats at no more cost, cheapest first."""
    best, kept = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1] if higher else points[i][1])):
        quality = points[i][1] if higher else -points[i][1]
        if quality > best:
            kept.append(i)
            best = quality
    return kept


def _plots(made: Comparison, ran: Sequence[Contender], looks: dict[str, tuple[str, str]]) -> list[str]:
    costs = [key for key in _COSTS if any(contender.summary(FIGURES[key]) for contender in ran)]

    def fronts(into: Any) -> None:
        every = into.subplots(-(-len(costs) // 2), 2, squeeze=False).ravel()
        for axes, key in zip(every, costs, strict=False):
            known = [contender for contender in ran if contender.summary(FIGURES[key]) is not None]
            points = [(_mean(c, FIGURES[key])[0], _mean(c, _QUALITY)[0]) for c in known]
            on_front = front(points, made.higher_is_better)
            line = [points[i] for i in on_front]
            axes.plot(*zip(*line, strict=True), color=SOFT, lw=1, ls="--", drawstyle="steps-post", zorder=1)
            for i, (contender, (cost, quality)) in enumerate(zip(known, points, strict=True)):
                colour, marker = looks[contender.name]
                wide, high = _mean(contender, FIGURES[key])[1], _mean(contender, _QUALITY)[1]
                axes.errorbar(cost, quality, xerr=wide or None, yerr=high or None, color=colour, lw=1.2, zorder=2)
                drawn = axes.plot(cost, quality, color=colour, marker=marker, ms=8, ls="none", zorder=3)[0]
                values = f"{_shown(contender, FIGURES[key])}, {made.metric} {_shown(contender, _QUALITY)}"
                tip(drawn, f"{contender.name}: {values}")
                if i in on_front:
                    # The dearest has no room to its right, and the side towards the better is always free.
                    dearest = cost == max(points)[0] > min(points)[0]
                    at = (-8, 6 if made.higher_is_better else -13) if dearest else (7, 6)
                    side = "right" if dearest else "left"
                    axes.annotate(
                        contender.name, (cost, quality), at, textcoords="offset points", fontsize=8.5, ha=side
                    )
            _scale(axes, FIGURES[key], [cost for cost, _ in points])
            axes.set(xlabel=_COSTS[key] or "forgetting, nats a token", ylabel=made.metric)
            axes.margins(0.14, 0.16)
            better = "better ↖" if made.higher_is_better else "better ↙"
            axes.set_title(better, loc="right", fontsize=8.5, color=SOFT, fontweight="normal")
        for axes in every[len(costs) :]:
            axes.set_visible(False)
        _legend(into, ran, looks)

    def curves(into: Any) -> None:
        left, right = into.subplots(1, 2, sharey=True)
        measure = _measure(made, ran)
        for contender in ran:
            colour, marker = looks[contender.name]
            band = _band(contender, measure)
            steps, seconds = [at for at, *_ in band], [time for _, time, *_ in band]
            for axes, x in ((left, steps), (right, seconds)):
                low, high = ([mean + sign * s for _, _, mean, s in band] for sign in (-1, 1))
                if any(s for *_, s in band):
                    axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
                means = [mean for _, _, mean, _ in band]
                tip(axes.plot(x, means, color=colour, marker=marker, ms=4, lw=1.8)[0], contender.name)
        left.set(xlabel="optimiser step", ylabel=f"held-out {measure}")
        right.set(xlabel="seconds of training")
        _legend(into, ran, looks)

    with_layers = [contender for contender in ran if any(run.layers for run in contender.runs)][:_MAPS]
    tall = 2.9 * -(-len(with_layers) // 4) + 0.4

    def sizes(into: Any) -> None:
        _maps(into, with_layers, "relative_norm")

    def ranks(into: Any) -> None:
        _maps(into, with_layers, "effective_rank")

    spread = "Bars are standard deviations over the seeds." if len(made.seeds) > 1 else "One seed: no spread is known."
    parts = [
        figure(
            "Quality and what it costs",
            f"Nothing is both better and cheaper than what the dashed line joins. {spread}",
            fronts,
            3.9 * -(-len(costs) // 2) + 0.5,
        ),
        figure(
            "Learning curves",
            "Means over the seeds; bands are one standard deviation to each side. By time, methods with slow steps "
            "fall behind.",
            curves,
            4.2,
        ),
    ]
    if with_layers:
        parts += [
            figure(
                "Size of the change, ‖ΔW‖ / ‖W‖",
                "A block a row, a kind of weight a column, on one scale; means over the seeds.",
                sizes,
                tall,
            ),
            figure(
                "Directions that the change takes",
                "The effective rank of ΔW: the exponential of the entropy of its singular values.",
                ranks,
                tall,
            ),
        ]
    return parts


def _legend(into: Any, ran: Sequence[Contender], looks: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=looks[c.name][0], marker=looks[c.name][1], ls="none", ms=7, label=c.name) for c in ran
    ]
    into.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(len(handles), 90 // max(len(c.name) + 4 for c in ran))),
    )


def _scale(axes: Any, of: Figure, costs: Sequence[float]) -> None:
    """Logarithmic where it takes that to tell the small ones apart; ticks with units."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if min(costs) > 0 and max(costs) > 8 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: of.show(value)))


def _measure(made: Comparison, ran: Sequence[Contender]) -> str:
    """What the curves show: accuracy where it is compared and was measured along the way, else the loss."""
    points = [point for contender in ran for run in contender.runs for point in run.curve]
    return "accuracy" if made.higher_is_better and all(p.accuracy is not None for p in points) else "loss"


def _band(contender: Contender, measure: str) -> list[tuple[int, float, float, float]]:
    """(step, mean seconds, mean, standard deviation) at the steps where every run was measured."""
    by_step = [{point.step: point for point in run.curve} for run in contender.runs]
    shared = sorted(set.intersection(*(set(points) for points in by_step)))
    band = []
    for step in shared:
        values = [getattr(points[step], measure) for points in by_step]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        seconds = statistics.fmean(points[step].seconds for points in by_step)
        band.append((step, seconds, statistics.fmean(values), spread))
    return band


def _maps(into: Any, contenders: Sequence[Contender], measure: str) -> None:
    sites = list(dict.fromkeys(layer.site for c in contenders for run in c.runs for layer in run.layers))
    maps = []
    for contender in contenders:
        found: dict[str, list[float]] = {}
        for run in contender.runs:
            for layer in run.layers:
                found.setdefault(layer.site, []).append(getattr(layer, measure))
        maps.append((contender.name, [statistics.fmean(found[site]) if site in found else None for site in sites]))
    heat_maps(into, sites, maps, together=True)


# ---- how it came about


def _searches(made: Comparison, looks: dict[str, tuple[str, str]]) -> list[str]:
    searched = [contender for contender in made.contenders if contender.trials]
    if not searched:
        return []

    def draw(into: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes = into.add_subplot()
        for contender in searched:
            colour, marker = looks[contender.name]
            done = sorted((t.lr, t.loss) for t in contender.trials if t.state == "complete" and t.loss is not None)
            cut = [(t.lr, t.curve[-1].loss) for t in contender.trials if t.state == "pruned" and t.curve]
            axes.plot(*zip(*done, strict=True) if done else ([], []), color=colour, marker=marker, ms=6, lw=1.4)
            for lr, loss in cut:
                axes.plot(lr, loss, color=colour, marker=marker, ms=6, mfc="none", ls="none")
            if chosen := [point for point in done if point[0] == contender.lr]:
                axes.plot(*chosen[0], color=colour, marker="o", ms=14, mfc="none", mew=1.6, ls="none")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set(xlabel="learning rate", ylabel="loss on validation rows")
        _legend(into, searched, looks)

    head = [(name, "") for name in ("method", "trial", "learning rate", "state", "validation loss", "why")]
    rows = [
        [
            _name(contender, looks),
            Cell(str(trial.number), trial.number),
            Cell(f"{trial.lr:.3g}", trial.lr),
            Cell(trial.state + (", chosen" if trial.state == "complete" and trial.lr == contender.lr else "")),
            Cell("–") if trial.loss is None else Cell(f"{trial.loss:.4f}", trial.loss),
            Cell(trial.reason or ""),
        ]
        for contender in searched
        for trial in contender.trials
    ]
    how = ", ".join(f"{key} {value}" for key, value in made.search.items())
    return [
        figure(
            "Learning-rate searches",
            f"Every contender had the same number of trials ({how}). Ringed: the one chosen. Hollow: stopped early, at "
            "the loss it had reached.",
            draw,
            4.0,
        ),
        f"<details><summary>Every trial</summary>{table(head, rows)}</details>",
    ]


def _runs(made: Comparison, looks: dict[str, tuple[str, str]]) -> list[str]:
    head = ["method", "seed", made.metric, "base's", "steps", "training", "a step", "memory", "rows at once"]
    head += ["forgetting", "[95 %]", "not measured"]
    rows = []
    for contender in made.contenders:
        for run in contender.runs:
            f, step = run.forgetting, run.step_seconds
            base = run.before.get("accuracy" if made.higher_is_better else "loss")
            rows.append([
                _name(contender, looks),
                Cell(str(run.seed), run.seed),
                Cell(_QUALITY.show(run.quality), run.quality),
                Cell("–") if base is None else Cell(_QUALITY.show(base), base),
                Cell(f"{run.steps:,}", run.steps),
                Cell(show_seconds(run.seconds), run.seconds),
                Cell("–") if step is None else Cell(show_seconds(step), step),
                Cell(show_bytes(run.peak_memory), run.peak_memory),
                Cell(str(run.micro_batch), run.micro_batch),
                Cell("–") if f is None else Cell(f"{f.loss:+.4f}", f.loss),
                Cell("–") if f is None else Cell(f"{f.low:+.4f} to {f.high:+.4f}", f.low),
                Cell("; ".join(f"{what}: {why}" for what, why in run.missing.items())),
            ])  # fmt: skip
    if not rows:
        return []
    return ["<h2>Every run</h2>", table([(name, "") for name in head], rows)]


def _how(made: Comparison) -> list[str]:
    sized = [
        [
            _name(contender, looks),
            Cell("one size only" if size.field is None else f"{size.field} = {size.value:g}"),
            Cell(f"{size.parameters:,}", size.parameters, level="WARN" if size.parameters > size.budget else ""),
            Cell(f"{size.budget:,}", size.budget),
        ]
        for looks in [_looks(made)]
        for contender in made.contenders
        if (size := contender.size) is not None
    ]
    parts = []
    if sized:
        head = [("method", ""), ("size", ""), ("parameters", ""), ("budget", "")]
        parts += ["<h2>Sizes for the budget of parameters</h2>", table(head, sized)]
    facts = {
        "machine": f"{made.device}, {made.threads} threads a run, {made.jobs} runs at once",
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
        "seeds": ", ".join(map(str, made.seeds)),
        "started": _when(made.started),
        "finished": _when(made.finished),
    }
    definitions = {of.title: of.definition for of in FIGURES.values()} | made.definitions
    recipe = escape(json.dumps(made.recipe, indent=2, ensure_ascii=False))
    changes = escape(json.dumps({c.name: c.changes for c in made.contenders}, indent=2, ensure_ascii=False))
    return [
        *parts,
        "<h2>To do it again</h2>",
        f"<pre>{escape(made.command)}</pre>",
        table([("", ""), ("", "")], [[Cell(key), Cell(value)] for key, value in facts.items()]),
        f"<details><summary>What each contender changes</summary><pre>{changes}</pre></details>",
        f"<details><summary>The base recipe, with all defaults</summary><pre>{recipe}</pre></details>",
        "<h2>What the figures mean</h2>",
        table([("figure", ""), ("definition", "")], [[Cell(key), Cell(value)] for key, value in definitions.items()]),
    ]
