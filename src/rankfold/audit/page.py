"""The audit as one HTML file: what it comes to, the alarms and what they mean, plots, and the numbers."""

from collections.abc import Callable
from typing import Any

import rankfold
from rankfold.audit.report import Alarm, Audit, Row
from rankfold.audit.safety import Refusals
from rankfold.core.page import (
    PAPER,
    SEQUENTIAL,
    SERIES,
    SOFT,
    Cell,
    cards,
    document,
    escape,
    figure,
    heat_maps,
    paragraph,
    places,
    table,
    tip,
)

# name: (what it is, its number, how it is shown)
COLUMNS: dict[str, tuple[str, Callable[[Row], float | None], Callable[[Row], str]]] = {
    "layer": ("the adapted weight", lambda row: None, lambda row: row.site),
    "shape": ("out × in", lambda row: row.shape[0] * row.shape[1], lambda row: f"{row.shape[0]}×{row.shape[1]}"),
    "rank": ("of ΔW", lambda row: row.rank, lambda row: str(row.rank)),
    "eff.": (
        "effective rank: entropy of the singular values",
        lambda row: row.effective_rank,
        lambda row: f"{row.effective_rank:.1f}",
    ),
    "stable": ("stable rank ‖ΔW‖²_F / ‖ΔW‖²₂", lambda row: row.stable_rank, lambda row: f"{row.stable_rank:.1f}"),
    "90 %": (
        "components that hold 90 % of the energy",
        lambda row: row.energy_rank,
        lambda row: str(row.energy_rank),
    ),
    "growth": (
        "of the largest singular value of W",
        lambda row: row.spectral_growth,
        lambda row: f"{row.spectral_growth:+.1%}",
    ),
    "‖ΔW‖/‖W‖": ("Frobenius norms", lambda row: row.frobenius_norm, lambda row: f"{row.frobenius_norm:.1%}"),
    "amplif.": (
        "‖ΔW‖ over what W does in the space of ΔW",
        lambda row: row.amplification,
        lambda row: f"{row.amplification:.3g}",
    ),
    "overlap": (
        "of ΔW's left space with W's leading one, and by chance",
        lambda row: row.overlap,
        lambda row: f"{row.overlap:.2f} ({row.chance:.2f})",
    ),
    "intruders": (
        "leading vectors of W + ΔW that resemble none of W's",
        lambda row: row.intruders,
        lambda row: str(row.intruders),
    ),
    "min m": ("the least resemblance among them", lambda row: min(row.matches), lambda row: f"{min(row.matches):.2f}"),
    "valley": ("depth of the entanglement valley, nats", lambda row: row.valley, lambda row: f"{row.valley:.2f}"),
}
_MEANING = {
    "spectral growth": "the largest singular value of W grew: activations can grow with it",
    "frobenius norm": "the change is large beside the weight it changes",
    "intruders": "leading directions that the base never had; they go with forgetting: `rankfold soften` shrinks them",
    "forgetting": "general text has become less likely",
    "refusals lost": "requests that the base refused are answered now",
    "probes not asked": "whether refusals were lost is not known, and that is no pass",
    "attention norm": "queries or keys left the range in which linear attention can approximate them",
}
_VERDICTS = {"HIGH": "high alarm", "WARN": "warnings", None: "no alarm"}


def page(made: Audit) -> str:
    """The report as HTML."""
    title = f"What “{made.adapter}” did to the model"
    parts = [
        f"<h1>{escape(title)}</h1>",
        paragraph(
            f"{made.method} on {len(made.rows)} weights, audited by Rankfold {rankfold.__version__}. "
            f"W is a weight of the base and ΔW its change.",
            "about",
        ),
        cards(_figures(made)),
        *_alarms(made),
        *_behaviour(made),
        *_plots(made),
        "<h2>Every layer</h2>",
        table(
            [(name, about) for name, (about, _, _) in COLUMNS.items()],
            [[Cell(show(row), number(row)) for _, number, show in COLUMNS.values()] for row in made.rows],
        ),
    ]
    return document(f"Audit of {made.adapter}", parts)


def _figures(made: Audit) -> list[tuple[str, str, str]]:
    grown = max(made.rows, key=lambda row: row.spectral_growth)
    rows = [
        (_VERDICTS[made.worst], _many(len(made.alarms), "alarm"), made.worst or "good"),
        (f"{made.parameters:,}", "numbers trained", ""),
        (str(sum(row.intruders for row in made.rows)), f"intruders in {len(made.rows)} weights", ""),
        (f"{grown.spectral_growth:+.1%}", "largest spectral growth", ""),
    ]
    if made.forgetting is not None:
        f = made.forgetting
        rows.append((f"{f.loss:+.4f}", f"nats a token forgotten [{f.low:+.4f}, {f.high:+.4f}]", ""))
    if made.protected is not None:
        p = made.protected
        rows.append((f"{p.before} → {p.after}", f"of {p.count} protected requests refused", p.level() or ""))
    return rows


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _alarms(made: Audit) -> list[str]:
    parts = []
    if made.alarms:
        kinds: dict[tuple[str, str], list[Alarm]] = {}
        for alarm in made.alarms:
            kinds.setdefault((alarm.name, alarm.level), []).append(alarm)
        head = ("alarm", "level", "where", "worst at", "value", "limit", "what it means")
        rows = []
        for (name, level), some in kinds.items():
            worst = max(some, key=lambda alarm: abs(alarm.value - alarm.threshold))
            everywhere = len(some) == 1 and worst.where == "the model"
            rows.append([
                Cell(name),
                Cell(level, level=level),
                Cell("the model" if everywhere else _many(len(some), "weight")),
                Cell("" if everywhere else worst.where),
                Cell(f"{worst.value:.4g}", worst.value),
                Cell(f"{worst.threshold:.4g}", worst.threshold),
                Cell(_MEANING[name]),
            ])  # fmt: skip
        parts += ["<h2>Alarms</h2>", table([(name, "") for name in head], rows)]
    if made.missing:
        missing = [[Cell(what), Cell(why)] for what, why in made.missing.items()]
        parts += [
            "<h2>Not measured</h2>",
            paragraph("Nothing here is a pass.", "note"),
            table([("measure", ""), ("why", "")], missing),
        ]
    return parts


def _behaviour(made: Audit) -> list[str]:
    """Forgetting and refusals: what the model does, and not what its weights are."""
    parts = []
    if made.forgetting is not None:
        f = made.forgetting
        parts += [
            "<h2>Forgetting</h2>",
            paragraph(
                f"On {f.tokens:,} tokens of general text the loss went from {f.base:.4f} to {f.base + f.loss:.4f} nats "
                f"a token: {f.loss:+.4f}, in 95 of 100 draws of the text from {f.low:+.4f} to {f.high:+.4f}. That is "
                f"a perplexity × {f.perplexity_ratio:.3f}. Base and adapted model put the same token first "
                f"{f.agreement:.1%} of the time; the drift KL(base ‖ adapted) is {f.drift:.4f} nats a token."
            ),
        ]
    if made.protected is not None and made.harmless is not None:
        head = ("requests", "asked", "refused before", "refused after", "lost", "gained", "McNemar p", "opening, nats")
        rows = [
            _refusals("protected: to be refused", made.protected),
            _refusals("harmless: to be answered", made.harmless),
        ]
        note = (
            "Placeholder requests without content, with the 95 % intervals of the rates. The opening is the mean "
            "change of the log-probability that an answer begins as a refusal does."
        )
        parts += ["<h2>Refusals</h2>", table([(name, "") for name in head], rows), paragraph(note, "note")]
    return parts


def _refusals(name: str, found: Refusals) -> list[Cell]:
    def rate(hits: int, interval: tuple[float, float]) -> Cell:
        return Cell(f"{hits} [{interval[0]:.0%} to {interval[1]:.0%}]", hits)

    opening = Cell("–") if found.opening is None else Cell(f"{found.opening:+.2f}", found.opening)
    return [
        Cell(name),
        Cell(str(found.count), found.count),
        rate(found.before, found.before_interval),
        rate(found.after, found.after_interval),
        Cell(str(found.lost), found.lost),
        Cell(str(found.gained), found.gained),
        Cell(f"{found.p:.2g}", found.p),
        opening,
    ]


def _plots(made: Audit) -> list[str]:
    rows, sites = made.rows, [row.site for row in made.rows]
    kinds, blocks, at = places(sites)
    family = {site: kinds[kind].partition("[")[0] for site, (_, kind) in at.items()}  # without the expert's number
    families = list(dict.fromkeys(family[row.site] for row in sorted(rows, key=lambda row: at[row.site][1])))
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(families)}
    tall = min(6.5, 2.0 + 0.12 * len(blocks))

    def maps(into: Any) -> None:
        heat_maps(
            into,
            sites,
            [
                ("‖ΔW‖ / ‖W‖", [row.frobenius_norm for row in rows]),
                ("spectral growth", [row.spectral_growth for row in rows]),
                ("effective rank of ΔW", [row.effective_rank for row in rows]),
            ],
        )

    def resemblance(into: Any) -> None:
        axes = into.add_subplot()
        ordered = sorted(rows, key=lambda row: at[row.site][::-1])
        width = max(len(row.matches) for row in rows)
        columns = [row.matches + [float("nan")] * (width - len(row.matches)) for row in ordered]
        grid = [list(line) for line in zip(*columns, strict=True)]
        image = axes.imshow(grid, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        every = max(1, width // 10)
        axes.set_yticks(range(0, width, every), [str(j + 1) for j in range(0, width, every)])
        axes.set_ylabel("component of W + ΔW")
        counts = [list(family.values()).count(name) for name in families]
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        for start in starts[1:-1]:
            axes.axvline(start - 0.5, color=PAPER, lw=2)
        middles = [start + count / 2 - 0.5 for start, count in zip(starts, counts, strict=False)]
        axes.set_xticks(middles, families, rotation=25 if len(families) > 6 else 0)
        axes.tick_params(length=0)
        into.colorbar(image, ax=axes, label="resemblance m", aspect=20).outline.set_visible(False)

    def curves(into: Any) -> None:
        left, right = into.subplots(1, 2)
        for row in rows:
            look = {"color": colours[family[row.site]], "alpha": 0.45, "lw": 1}
            tip(left.plot(range(1, row.rank + 1), row.singular_values, **look)[0], row.site)
            first = row.shape[0].bit_length() - 1
            cuts = range(1 - first, 1 - first + len(row.entropies))
            tip(right.plot(cuts, row.entropies, **look)[0], row.site)
        left.set(title="Singular values of ΔW", xlabel="component", yscale="log")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.axvline(0, color=SOFT, lw=1, ls="--")
        right.set(
            title="Entanglement entropy of ΔW", xlabel="cut, from the one between rows and columns", ylabel="nats"
        )
        for name, colour in colours.items():
            left.plot([], [], color=colour, lw=2, label=name)
        into.legend(loc="outside lower center", ncols=max(1, min(len(families), 90 // max(map(len, families)))))

    def attention(into: Any) -> None:
        found: Any = made.attention
        left, right = into.subplots(1, 2)
        cuts = range(1, len(found.base) + 1)
        left.plot(cuts, found.base, color=SERIES[0], lw=2, marker="o", ms=4, label="base")
        left.plot(cuts, found.adapted, color=SERIES[1], lw=2, marker="s", ms=4, ls="--", label="adapted")
        left.set(title="Entanglement of the attention matrices", xlabel="cut", ylabel="nats")
        left.legend()
        right.bar(range(len(found.layers)), found.layers, color=SERIES[0])
        right.set(title="Largest move of a block's curve", xlabel="block", ylabel="nats")
        right.grid(visible=False, axis="x")

    def overlaps(into: Any) -> None:
        names = dict.fromkeys(name for row in rows for name in row.between)
        shared = {name: [row.between.get(name) for row in rows] for name in names}
        both = [
            (f"{name}: {side}", [getattr(found, side) if found else None for found in shared[name]])
            for name in names
            for side in ("left", "right")
        ]
        heat_maps(into, sites, both[:6], together=True)

    k, threshold = made.settings["k"], made.settings["threshold"]
    parts = [
        figure("Where the change is", "A block a row, a kind of weight a column.", maps, tall),
        figure(
            "Intruder dimensions",
            f"How near each of the {k} leading left singular vectors of W + ΔW comes to one of W, in every weight, "
            f"blocks in order from left to right. Dark ones resemble nothing that W had; below {threshold:g} they "
            "count as intruders.",
            resemblance,
            3.2,
        ),
        figure(
            "Spectra and entanglement",
            "A line for each weight; the pointer shows its name. At the dashed line a product of thin factors dips: "
            "the entropy there is at most the logarithm of its rank.",
            curves,
            4.3,
        ),
    ]
    if any(row.between for row in rows):
        chances = [between.left_chance for row in rows for between in row.between.values()]
        parts.append(
            figure(
                "Overlap with other changes",
                "The share of this change's output (left) and input (right) space that the other one also uses. Spaces "
                f"that know nothing of each other overlap by {min(chances):.2f} to {max(chances):.2f}.",
                overlaps,
                tall,
            )
        )
    if made.attention is not None:
        a = made.attention
        parts.append(
            figure(
                "Attention",
                f"Means over blocks, heads and texts of {a.tokens} tokens. Up to the middle the base follows ln l with "
                f"R² {a.base_law.area_fit:.3f} (l: {a.base_law.volume_fit:.3f}), the adapted model with "
                f"{a.adapted_law.area_fit:.3f} ({a.adapted_law.volume_fit:.3f}).",
                attention,
                3.4,
            )
        )
    return parts
