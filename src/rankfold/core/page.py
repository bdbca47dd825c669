"""A report as one HTML file: it opens without a network, in light and in dark, and asks nobody for anything.

Plots are drawn in the light colours by Matplotlib and put into the page as SVG, where each of these colours becomes a
variable of the page's style; so they follow the reader's theme, and their text is text.
"""

import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

# name: (light, dark). s0 to s6 tell series apart, to colour-blind readers as well; beyond that markers do.
_COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "soft": ("#5c636b", "#9da5ae"),
    "line": ("#dfe2e6", "#343a42"),
    "paper": ("#fffffe", "#15181c"),
    "panel": ("#f6f7f9", "#1d2126"),
    "warn": ("#9a5b00", "#f0b35a"),
    "high": ("#b3261e", "#ff8a80"),
    "good": ("#1b6e3c", "#6fd39a"),
    "s0": ("#0072b2", "#4aa3e8"),
    "s1": ("#d55e00", "#f08a4b"),
    "s2": ("#009e73", "#2fb98a"),
    "s3": ("#d960a8", "#f0a3d0"),
    "s4": ("#7a5c00", "#e8cf5a"),
    "s5": ("#3d2b7d", "#8a62d8"),
    "s6": ("#3f9fd9", "#b4dcff"),
}
INK, SOFT, LINE, PAPER = (_COLOURS[name][0] for name in ("ink", "soft", "line", "paper"))
SERIES = [light for name, (light, _) in _COLOURS.items() if name[0] == "s" and name[1:].isdigit()]
MARKERS = "osD^vPX*"
SEQUENTIAL = "viridis"

_PLOT: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
* { box-sizing: border-box; }
body { font: 15px/1.55 var(--font); color: var(--ink); background: var(--paper); }
body { max-width: 1200px; margin: 2.2rem auto 4rem; padding: 0 1.4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem; }
p { margin: .4rem 0; max-width: 92ch; } .about, figcaption, .note { color: var(--soft); }
code, pre { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .8rem; margin: 1.3rem 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .95rem; }
.card b { display: block; font-size: 1.4rem; line-height: 1.35; }
.card span { color: var(--soft); font-size: .87rem; }
.HIGH { color: var(--high); } .WARN { color: var(--warn); } .good { color: var(--good); }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 10px; margin: .8rem 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%%; font-size: .87rem; }
th, td { text-align: right; padding: .36rem .62rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
td { border-top: 1px solid var(--line); } tbody tr:hover td { background: var(--panel); }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600; z-index: 1; }
th { white-space: normal; vertical-align: bottom; line-height: 1.3; }
th.words, td.words { text-align: left; white-space: normal; } td:has(.dot) { white-space: nowrap !important; }
td small { display: block; color: var(--soft); line-height: 1.2; }
details { margin: .8rem 0; } summary { cursor: pointer; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--s0); }
th[aria-sort] button::after { content: " \\2193"; } th[aria-sort=ascending] button::after { content: " \\2191"; }
figure { margin: 1rem 0 1.6rem; overflow-x: auto; } figcaption { font-size: .87rem; max-width: 90ch; }
figure svg { display: block; width: 100%%; height: auto; min-width: 620px; }
figure svg image { image-rendering: pixelated; }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%%; margin-right: .5em; }
"""

# Tables are in order without it. A column's own kind, numbers or words, is told by the cells' data-v.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentNode, rows = th.closest("table").tBodies[0], at = th.cellIndex;
  const up = th.getAttribute("aria-sort") === "descending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const cell = row.cells[at]; return cell.dataset.v ?? cell.textContent; };
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)], [m, n] = [parseFloat(x), parseFloat(y)];
    if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
    return (isNaN(m) ? x.localeCompare(y) : m - n) * (up ? 1 : -1);
  };
  rows.append(...[...rows.rows].sort(order));
};
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the number that it is sorted by, a second line that is small, a colour for the
    reader, a dot of a colour."""

    text: str
    value: float | None = None
    under: str = ""
    level: str = ""
    dot: str = ""


def document(title: str, parts: Iterable[str]) -> str:
    """The file. `parts` are HTML."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    light, dark = ("".join(f"--{name}: {pair[i]}; " for name, pair in _COLOURS.items()) for i in (0, 1))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE % (light, dark)}</style></head><body>{''.join(parts)}<script>{_SCRIPT}</script></body>"
        "</html>\n"
    )


def escape(text: str) -> str:
    """Text as HTML: names come from files that a stranger may have made."""
    return html.escape(text)


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def cards(made: Iterable[tuple[str, str, str]]) -> str:
    """(the figure, what it is, its level) each."""
    shown = (
        f'<div class="card"><b class="{level}">{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small, level in made
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]]) -> str:
    """Of (column, what it is); a click on a column sorts by it. Cells without a number are words."""
    words = [all(row[i].value is None and row[i].text != "–" for row in rows) for i in range(len(head))]

    def kind(i: int, level: str = "") -> str:
        return f' class="{" ".join(filter(None, ("words" if words[i] else "", level)))}"' if words[i] or level else ""

    titles = (
        f'<th scope="col"{kind(i)} title="{escape(about)}"><button type="button">{escape(name)}</button></th>'
        for i, (name, about) in enumerate(head)
    )

    def shown(i: int, cell: Cell) -> str:
        value = "" if cell.value is None else f' data-v="{cell.value!r}"'
        dot = f'<i class="dot" style="background: {themed(cell.dot)}"></i>' if cell.dot else ""
        under = f"<small>{escape(cell.under)}</small>" if cell.under else ""
        return f"<td{kind(i, cell.level)}{value}>{dot}{escape(cell.text)}{under}</td>"

    body = "".join(f"<tr>{''.join(shown(i, cell) for i, cell in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(titles)}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, caption: str, draw: Callable[[Any], None], height: float, width: float = 10.0) -> str:
    """A section with a plot: `draw` is given a Matplotlib figure of this size in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_PLOT, "svg.hashsalt": title}):
        made = Figure(figsize=(width, height), layout="constrained")
        draw(made)
        file = StringIO()
        made.savefig(file, format="svg", metadata={"Date": None})
    return (
        f'<h2>{escape(title)}</h2><figure role="group" aria-label="{escape(title)}">{_inline(file.getvalue())}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def tip(artist: Any, text: str) -> None:
    """What is shown where the pointer rests on something drawn."""
    artist.set_gid(f"tip {text}")


def themed(colour: str) -> str:
    """A light colour as the variable that also has a dark one."""
    return next((f"var(--{name})" for name, (light, _) in _COLOURS.items() if light == colour), colour)


def _inline(svg: str) -> str:
    """Matplotlib's file as a part of a page: no prologue, no addresses of name spaces, the page's colours and font."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r' id="tip ([^"]*)">', r"><title>\1</title>", svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--font)")
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: themed(found[0]), svg)


def places(sites: Sequence[str]) -> tuple[list[str], list[int], dict[str, tuple[int, int]]]:
    """Layers as a grid: the kinds (q_proj, ...) in order, the numbers of the blocks, and where each layer stands.

    A layer's block is the first number in its path; what follows it is the kind, by its last name where that tells.
    """
    split = {site: re.search(r"(?:^|\.)(\d+)\.(.+)$", site) for site in sites}
    parts = {site: (int(found[1]), found[2]) if found else (0, site) for site, found in split.items()}
    full = list(dict.fromkeys(kind for _, kind in parts.values()))
    last = {kind: kind.rpartition(".")[2] for kind in full}
    short = {kind: name if list(last.values()).count(name) == 1 else kind for kind, name in last.items()}
    blocks = sorted({block for block, _ in parts.values()})
    at = {site: (blocks.index(block), full.index(kind)) for site, (block, kind) in parts.items()}
    return [short[kind] for kind in full], blocks, at


def heat_maps(
    into: Any, sites: Sequence[str], maps: Sequence[tuple[str, Sequence[float | None]]], together: bool = False
) -> None:
    """Grids of blocks × kinds, four in a row, a value a layer; `together` on one scale, logarithmic if need be."""
    from matplotlib.colors import LogNorm, Normalize

    kinds, blocks, at = places(sites)
    known = [value for _, values in maps for value in values if value is not None]
    scale: Any = None
    if together and known:
        wide = min(known) > 0 and max(known) > 20 * min(known)
        scale = (LogNorm if wide else Normalize)(min(known), max(known))
    across = min(4, len(maps))
    every = into.subplots(-(-len(maps) // across), across, squeeze=False)
    for axes in every.ravel()[len(maps) :]:
        axes.set_visible(False)
    image: Any = None
    for axes, (title, values) in zip(every.ravel(), maps, strict=False):
        grid = [[float("nan")] * len(kinds) for _ in blocks]
        for site, value in zip(sites, values, strict=True):
            if value is not None:
                grid[at[site][0]][at[site][1]] = value
        image = axes.imshow(grid, aspect="auto", cmap=SEQUENTIAL, interpolation="nearest", norm=scale)
        axes.grid(visible=False)
        axes.set_title(title)
        step = max(1, -(-len(kinds) // 16))
        axes.set_xticks(
            range(0, len(kinds), step), kinds[::step], rotation=60, ha="right", rotation_mode="anchor", fontsize=8.5
        )
        step = max(1, -(-len(blocks) // 12))
        axes.set_yticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]], fontsize=8.5)
        axes.tick_params(length=0)
        if not together:
            _bar(into, image, axes)
    if together:
        _bar(into, image, list(every.ravel()[: len(maps)]))
    for axes in every[:, 0]:
        axes.set_ylabel("block")


def _bar(into: Any, image: Any, axes: Any) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    few: Any = {}
    if isinstance(image.norm, LogNorm):  # by itself it would write every second number, as powers of ten
        few = {"ticks": LogLocator(subs=(1, 2, 5)), "format": "%g"}
    bar = into.colorbar(image, ax=axes, shrink=0.9, aspect=30, **few)
    if few:
        bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5)
