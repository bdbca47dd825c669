"""What every benchmark shares: interleaved timing on a machine that others use too, its description, JSON out."""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Sides = Mapping[str, Callable[[], Any]]


def interleaved(
    sides: Sides,
    rounds: int = 15,
    warmup: int = 2,
    repeat: int = 1,
    after: Sides | None = None,
    others: float = 0.05,
    patience: float = 300.0,
) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` samples each, taken in turn: a, b, c, b, c, a, ...

    A sample is the mean of `repeat` runs (for what takes milliseconds). `after[name]` undoes a run, untimed.
    A sample is taken when other processes use less than `others` of the machine's processors, and thrown away if they
    did not while it ran: two threads that wait for each other on a busy core take several times as long, and not in
    proportion. After `patience` seconds whatever comes is taken.
    """
    after = after or {}

    def sample(name: str) -> float:
        seconds = 0.0
        for _ in range(repeat):
            started = time.perf_counter()
            sides[name]()
            seconds += time.perf_counter() - started
            if name in after:
                after[name]()
        return seconds / repeat

    for _ in range(warmup):
        for name in sides:
            sample(name)
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names, end = list(sides), time.monotonic() + patience
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            while True:
                share = _others()
                time.sleep(0.1)
                while share() > others and time.monotonic() < end:
                    share = _others()
                    time.sleep(0.25)
                share, seconds = _others(), sample(name)
                if share() <= others or time.monotonic() > end:
                    samples[name].append(seconds)
                    break
    return samples


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that were allocated on the processor at once while it ran, over those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _others() -> Callable[[], float]:
    """A function that tells which share of all processors other processes used since this call."""

    def busy() -> tuple[float, float, float]:
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return 0.0, 0.0, 0.0
        used = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks
        return used, sum(os.times()[:2]), time.perf_counter()

    before = busy()

    def share() -> float:
        used, own, wall = (b - a for a, b in zip(before, busy(), strict=True))
        return max(0.0, used - own - 0.02) / (wall * (os.cpu_count() or 1)) if wall else 0.0  # clock ticks are coarse

    return share


def ratios(samples: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over median, to the side `base`."""
    return {name: statistics.median(times) / statistics.median(samples[base]) for name, times in samples.items()}


def table(
    samples: Mapping[str, list[float]], base: str, targets: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """A row for each side: median and smallest milliseconds, ratio to `base`, the target on that ratio."""
    return [
        {
            **common,
            "side": name,
            "median ms": statistics.median(times) * 1e3,
            "min ms": min(times) * 1e3,
            f"over {base}": ratios(samples, base)[name],
            "target": targets.get(name, ""),
        }
        for name, times in samples.items()
    ]


def machine() -> dict[str, Any]:
    """Processor, cores, threads and versions; nothing that names the machine."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def arguments(description: str, **defaults: int | str) -> argparse.Namespace:
    """`--json PATH`, `--threads N`, `--patience SECONDS` and an option for each default, a number or a text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def report(given: argparse.Namespace, benchmark: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print the rows as a table and write them, with the machine, to `--json`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if given.json:
        date = datetime.date.today().isoformat()
        result = {"benchmark": benchmark, "date": date, "machine": machine(), "rows": rows, **more}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
