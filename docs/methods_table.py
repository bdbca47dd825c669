"""Writes the table of methods into README.md, between its two markers. Run it with `make docs`."""

from pathlib import Path

import rankfold
from rankfold.core.registry import Entry

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods: start -->", "<!-- methods: end -->"


def row(entry: Entry) -> str:
    where = ", ".join(kind for kind in ("linear", "embedding", "conv", "experts") if entry.supports.get(kind) is True)
    can = [
        f"[`{entry.slug}`](src/rankfold/{entry.axis}/{entry.slug.replace('-', '_').replace('+', '_plus')}.py)",
        entry.title,
        entry.source,
        where or "–",
        *("yes" if entry.supports.get(what) is True else "–" for what in ("merge", "as-lora", "inits")),
    ]
    return "| " + " | ".join(can) + " |"


def table() -> str:
    """The registry as Markdown, one section an axis."""
    entries = rankfold.methods()
    parts = []
    for axis in dict.fromkeys(entry.axis for entry in entries):
        own = [entry for entry in entries if entry.axis == axis]
        if axis == "deltas":
            names = ["method", "paper", "source", "layers", "merge", "as LoRA", "inits"]
            head = f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"
            rows = [row(entry) for entry in own]
        else:
            head = "| component | paper | source |\n| --- | --- | --- |"
            rows = [f"| {row(entry).split(' | ')[0][2:]} | {entry.title} | {entry.source} |" for entry in own]
        parts.append(f"**{axis}**\n\n{head}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def rewritten(text: str) -> str:
    """The README's text with the present table in it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
