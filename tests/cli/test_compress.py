"""`rankfold compress`: from a file to a smaller one, without a model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import rankfold
from rankfold import cli
from rankfold.cli import compress, inspect
from rankfold.compose.compress import compress as compress_adapter
from rankfold.core.checkpoint import SavedDeltas
from tests.cli.test_squeeze import loaded, output, trained

SOURCE = rankfold.LoRA(rank=6, alpha=12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = trained(SOURCE, modules_to_save=["head"], overrides={"b": {"rank": 8}})
    return rankfold.save(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands of these tests, with what the command line makes of errors."""
    app = typer.Typer()
    compress.register(app)
    inspect.register(app)
    monkeypatch.setattr(cli, "app", app)


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (["--how", "compeft"], rankfold.ComPEFT()),
        (["--how", "compeft", "--density", 0.4, "--alpha", 2, "--by-tensor"], None),
        (["--how", "compeft", "--from-start"], rankfold.ComPEFT(from_start=True)),
        (["--how", "onebit", "--bits", 2], rankfold.OneBit(bits=2)),
    ],
)
def test_what_the_command_writes(
    options: list[Any], how: Any, saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = how or rankfold.ComPEFT(density=0.4, alpha=2, by_tensor=True)
    code, out, _ = run(capfd, "compress", saved, *options, "--output", tmp_path / "small", "--json")
    assert code == 0
    said = json.loads(out)
    path, report = compress_adapter(saved, how, tmp_path / "same")
    mine, same = (SavedDeltas(folder).whole().state_dict() for folder in (tmp_path / "small", path))
    assert all(torch.equal(tensor, same[name]) for name, tensor in mine.items())
    assert said["ratio"] == pytest.approx(report.ratio, rel=0.02)
    assert said["after"] == (tmp_path / "small" / "adapter.safetensors").stat().st_size
    assert said["layers"].keys() == {"a", "b"}
    assert said["layers"]["a"]["error"] == pytest.approx(report.layers["a"].error)


def test_the_table_and_inspect(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "small"
    code, out, err = run(capfd, "compress", saved, "--how", "compeft", "--density", 0.1, "--output", to)
    assert code == 0
    assert "kept" in out
    assert "smaller than 16 bits a number" in err
    code, out, _ = run(capfd, "inspect", to)
    assert code == 0
    assert "compressed" in out
    assert "density=0.1" in out
    code, out, _ = run(capfd, "inspect", to, "--json")
    assert json.loads(out)["compressed"]["name"] == "compeft"
    assert json.loads(out)["tensors"]["deltas.a.A"] == {"dtype": "float32", "shape": [6, 12]}
    model, _ = loaded(to)
    assert output(model).shape == (7, 3)


def test_bad_input_is_one_line(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to = ("--output", tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for arguments, message in (
        ((saved, *to), "Missing option '--how'"),
        ((saved, *to, "--how", "zip"), "Invalid value for '--how'"),
        ((saved, *to, "--how", "compeft", "--density", 2), "density: Input should be less than or equal to 1"),
        ((saved, *to, "--how", "compeft", "--bits", 2), "bits: Extra inputs are not permitted"),
        ((saved, *to, "--how", "onebit", "--bits", 9), "bits: Input should be less than or equal to 4"),
        ((saved, *to, "--how", "onebit", "--alpha", 1), "alpha: Extra inputs are not permitted"),
        ((saved, "--how", "onebit"), "Missing option '--output'"),
        ((saved, "--how", "onebit", "--output", tmp_path / "full"), "is not empty"),
        (("./nowhere", *to, "--how", "onebit"), "there is no folder './nowhere'"),
    ):
        code, out, err = run(capfd, "compress", *arguments)
        assert (code, out) == (2, ""), message
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "b").exists()


def test_it_needs_no_model_and_no_transformers(saved: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rankfold.compose.compress import compress; "
        "print(compress(sys.argv[1], 'onebit', sys.argv[2])); "
        "assert 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "b")]
    assert "kept=1.0" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
