"""`rankfold transfer`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.main import get_command

import rankfold
from rankfold import LoRA
from rankfold.cli import transfer
from rankfold.compose import trans_lora
from rankfold.core.checkpoint import read
from rankfold.errors import RankfoldError
from tests.compose import writers
from tests.contract.nets import net


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, its base and an update of that."""
    at = tmp_path_factory.mktemp("bases")
    model = net(dtype=torch.float32)
    (at / "old").mkdir()
    (at / "new").mkdir()
    save_file(model.state_dict(), at / "old" / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in model.state_dict().items()}, at / "new" / "model.safetensors")
    rankfold.attach(model, LoRA(rank=2), ["fc1", "fc2"])
    rankfold.save(model, at / "adapter")
    return at


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, str]:
    app = typer.Typer()
    transfer.register(app)
    capfd.readouterr()
    get_command(app)([str(argument) for argument in arguments], standalone_mode=False)
    return capfd.readouterr()


def test_porting_as_json_and_as_a_table(bases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = (bases / "adapter", "--to", bases / "new", "--from", bases / "old")
    out, _ = run(capfd, *command, "--output", tmp_path / "a", "--json")
    said = json.loads(out)
    assert (said["portings"], said["forced"], list(said["layers"])) == (1, None, ["fc1", "fc2"])
    assert said["layers"]["fc1"]["size"] == pytest.approx(0.01, rel=1e-3)
    assert said["layers"]["fc1"]["cosine"] == pytest.approx(1, abs=1e-4)
    out, err = run(capfd, *command, "--output", tmp_path / "b")
    assert "0.0100" in out
    assert f"adapter: {tmp_path / 'b'}" in err
    run(capfd, tmp_path / "a", "--undo", "--output", tmp_path / "back")
    assert read(tmp_path / "back").document.base == read(bases / "adapter").document.base


def test_what_is_missing_is_said(bases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to = ("--output", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    new = ("--to", bases / "new")
    for arguments, message in (
        ((bases / "adapter", *to), "--to: say the model"),
        ((bases / "adapter", *to, *new, "--how", "trans-lora"), "--kit: trans-lora needs"),
        ((bases / "adapter", *new, "--output", tmp_path / "full"), "is not empty"),
        ((bases / "adapter", *to, "--to", tmp_path / "none"), "no such file"),
        ((bases / "adapter", *to, "--prepare"), "cannot read the recipe"),
        ((bases / "adapter", *to, "--undo"), "never ported"),
    ):
        with pytest.raises(RankfoldError, match=message):
            run(capfd, *arguments)
    assert not (tmp_path / "x").exists()


def test_a_kit_and_a_transfer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfold.train import train
    from rankfold.train.recipe_file import validate

    model = writers.pretrained(tmp_path / "model", 60)
    rows = writers.write_rows(tmp_path / "rows.jsonl", 20)
    train(validate(writers.recipe_values(model, rows, 3)), tmp_path / "run")
    steps = ("--set", "budget.steps=2", "--set", "budget.epochs=null", "--set", "checkpoint.steps=9")
    options = (tmp_path / "run" / "adapter", "--json", *steps)
    out, _ = run(capfd, *options, "--prepare", "--name", "toys", "--output", tmp_path / "kit")
    assert json.loads(out)["count"] == 16
    rows.unlink()
    monkeypatch.setattr(trans_lora, "margins", lambda *_: lambda texts: [float(len(text) - 3) for text in texts])
    command = (*options, "--how", "trans-lora", "--kit", tmp_path / "kit", "--to", model, "--count", 6)
    out, _ = run(capfd, *command, "--max-new-tokens", 4, "--output", tmp_path / "out")
    said = json.loads(out)
    assert said["report"]["steps"] == 2
    assert read(said["adapter"]).document.method["name"] == "lora"
    out, _ = run(capfd, *command, "--max-new-tokens", 4, "--output", tmp_path / "out", "--resume")
    assert json.loads(out)["report"]["steps"] == 2
