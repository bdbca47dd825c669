"""Run the claims of one axis, or all, and rewrite RESULTS.md: `python -m claims [AXIS] [--missing]`.

A claim whose runs were finished before with the same settings only judges them again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rankfold.core.files import write_whole

HERE = Path(__file__).parent
TABLE = HERE / "RESULTS.md"


def main() -> int:
    axes = sorted(folder.name for folder in HERE.iterdir() if folder.is_dir() and list(folder.glob("[!_]*.py")))
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("axis", nargs="?", choices=axes, help="default: all")
    arguments.add_argument("--missing", action="store_true", help="only claims without a result")
    given = arguments.parse_args()
    failed = []
    for script in sorted(HERE.glob(f"{given.axis or '*'}/[!_]*.py")):
        if given.missing and (HERE / "results" / f"{script.stem.replace('_', '-')}.json").exists():
            continue
        module = f"claims.{script.parent.name}.{script.stem}"
        if subprocess.run([sys.executable, "-m", module], cwd=HERE.parent).returncode:
            failed.append(module)
    write_whole(TABLE, table())
    print(f"{TABLE.relative_to(HERE.parent)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def table() -> str:
    """The text of RESULTS.md: a row for each expectation of each result."""
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    counts = {verdict: sum(r["verdict"] == verdict for r in results) for verdict in _VERDICTS}
    lines = [
        "# What the claims came to",
        "",
        "Written by `make claims`; each script compares the sides with the same data order and the same seeds, a claim",
        "holds if the mean of the paired differences is on its side by more than its standard error. Small models, few",
        "steps and three seeds can miss what holds at scale, and the other way round.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".",
    ]
    for axis in sorted({result["axis"] for result in results}):
        lines += ["", f"## {axis}", "", "| system | expected | figures | verdict |", "| --- | --- | --- | --- |"]
        for result in (r for r in results if r["axis"] == axis):
            lines += [_row(result, expectation) for expectation in result["expectations"]]
        lines += ["", *(_about(r) for r in results if r["axis"] == axis)]
    return "\n".join(lines) + "\n"


_VERDICTS = ("holds", "does not hold", "inconclusive")


def _row(result: dict[str, Any], one: dict[str, Any]) -> str:
    means = ", ".join(f"{side} {value:.4g}" for side, value in one["means"].items())
    return f"| {result['slug']} | {one['expectation']} | {means} ± {one['standard error']:.2g} | {one['verdict']} |"


def _about(result: dict[str, Any]) -> str:
    where = f"{result['model']}, {result['data']}; seeds {', '.join(map(str, result['seeds']))}; `{result['command']}`"
    note = f" {result['note']}" if result["note"] else ""
    return f"- **{result['slug']}** ({result['source']}): {result['claim']} {where}.{note}"


if __name__ == "__main__":
    sys.exit(main())
