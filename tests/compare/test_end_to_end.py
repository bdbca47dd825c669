"""A whole comparison on a tiny model: killed on the way, gone on with, one contender failing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfold import cli
from rankfold.compare.result import Comparison

pytestmark = pytest.mark.slow


@pytest.fixture
def written(values: dict[str, Any], place: Path, tmp_path: Path) -> Path:
    values["contenders"] = ["lora", "pissa", {"name": "too wide", "method": {"name": "lora", "rank": 999}}]
    values["text"] = {"path": str(place / "text.txt"), "max_length": 64}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "compare.yaml"


def outcomes(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/outcome.json")}


def alive(output: Path) -> list[int]:
    """Processes that have a file of the comparison open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                links = [os.readlink(handle) for handle in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(str(output) in link for link in links):
                found.append(int(process.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_and_gone_on_with(written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "rankfold", "compare", str(written), "--output", str(output), "--jobs", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 600
        while len(outcomes(output)) < 2 and time.monotonic() < until and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    done = outcomes(output)
    assert len(done) >= 2
    until = time.monotonic() + 10
    while alive(output) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(output) == []  # the process of a run goes with its parent

    assert cli.run(["compare", str(written), "--output", str(output)]) == 2
    assert "holds a comparison already: add --resume" in capfd.readouterr().err
    assert cli.run(["compare", str(written), "--output", str(output), "--resume", "--jobs", "2"]) == 0
    text = capfd.readouterr()
    assert {path: outcomes(output)[path] for path in done} == done
    assert "rank 999 is over the layer's size" in " ".join(text.err.split())

    found = Comparison.model_validate_json((output / "comparison.json").read_bytes())
    lora, pissa, wide = found.contenders
    for contender in (lora, pissa):
        assert [run.seed for run in contender.runs] == [0, 1]
        assert contender.failures == ()
        for run in contender.runs:
            assert run.missing == {}
            assert [point.step for point in run.curve] == [0, 1, 2, 3, 4]
            assert run.quality == run.after["loss"] == run.curve[-1].loss < run.curve[0].loss
            assert run.parameters == 2 * sum(layer_sizes())
            adapter = output / "runs" / f"{found.contenders.index(contender)}-{contender.name}" / f"seed-{run.seed}"
            assert run.file_bytes == sum(file.stat().st_size for file in (adapter / "run" / "adapter").iterdir())
            assert 0 < run.peak_memory < 2**30
            assert run.forgetting is not None
            assert run.inference is not None
            assert run.inference.merged is not None
            assert len(run.layers) == 14
            assert all(1 <= layer.effective_rank <= layer.rank <= 4 for layer in run.layers)
    first_losses = {contender.runs[0].curve[0].loss for contender in (lora, pissa)}
    assert len(first_losses) == 1  # the same base on the same rows
    assert wide.failed
    assert "rank 999 is over the layer's size" in wide.failures[0].reason
    assert (found.rows, found.seeds, found.metric) == ({"train": 48, "test": 12}, (0, 1), "held-out loss")
    with (output / "comparison.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 4 + 2
    assert "<html" in (output / "comparison.html").read_text()
    assert json.loads((output / "data" / "rows.json").read_text())["rows"] == found.rows

    written.write_text(written.read_text().replace("seeds: 2", "seeds: 3"))
    assert cli.run(["compare", str(written), "--output", str(output), "--resume"]) == 2
    assert "holds another comparison, different in: seeds" in capfd.readouterr().err


def layer_sizes() -> list[int]:
    from rankfold.core.targets import find
    from tests.train import tiny

    return [target.site.in_ + target.site.out for target in find(tiny.llama(), "all-linear")]
