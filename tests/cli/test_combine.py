"""`rankfold combine`: saved adapters into one, told as a table or as JSON."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankfold
from rankfold import LoRA, cli
from rankfold.core.checkpoint import read


def net(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(10, 12)})


def trained(folder: Path, method: rankfold.Method, seed: int, base: int = 0) -> Path:
    model = net(base)
    adapter = rankfold.attach(model, method, ["a", "b"], f"adapter{seed}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return rankfold.save(model, folder / f"adapter{seed}", adapter.name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("two")
    return trained(folder, LoRA(rank=3), 1), trained(folder, LoRA(rank=2, alpha=4), 2)


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.run(["combine", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def changes(folder: Path) -> dict[str, torch.Tensor]:
    adapter = rankfold.load(net(), folder)
    return {site: (d.adapted_weight(d.W) - d.W).detach() for site, d in adapter.deltas.items()}


def test_the_table_and_the_file(two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *two, "--output", tmp_path / "c", "--weights", "0.7,-0.3", "--how", "linear")
    assert code == 0
    assert "3, 2 → 5" in out
    assert "error" in out
    assert "combined adapter" in err
    one, other, made = map(changes, (*two, tmp_path / "c"))
    for site, change in made.items():
        torch.testing.assert_close(change, 0.7 * one[site] - 0.3 * other[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare", "lego", "svd-merge", "lora-lego"])
def test_every_rule_by_its_name(
    how: str, two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, *two, "--output", tmp_path / "c", "--how", how, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["how"]["name"] in ("task-arithmetic", "svd-merge", "ties", "dare", "lora-lego")
    assert list(said["layers"]) == ["a", "b"]
    for site, layer in said["layers"].items():
        assert layer["before"] == [3, 2]
        assert layer["rank"] == read(tmp_path / "c").tensors[f"deltas.{site}.A"].shape[0]
    assert said["forced"] is None


def test_hyperparameters(two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--how", "dare", "--set", "drop=0", "--set", "rule=ties", "--space", "factors", "--seed", 3, "--json")
    one = trained(tmp_path, LoRA(rank=2), 5)
    code, out, _ = run(capfd, two[1], one, "--output", tmp_path / "c", *options)
    assert code == 0
    how = json.loads(out)["how"]
    assert (how["drop"], how["rule"], how["space"]) == (0, "ties", "factors")


def test_other_methods_with_the_weights_of_the_base(
    two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dora = trained(tmp_path, rankfold.build("dora", rank=2), 7)
    code, out, err = run(capfd, two[0], dora, "--output", tmp_path / "c", "--how", "linear")
    assert (code, out) == (2, "")
    assert "give the base model, or the folder that holds it" in err
    save_file({name: t.contiguous() for name, t in net().state_dict().items()}, tmp_path / "model.safetensors")
    given = ("--model", tmp_path, "--weights", "1,1")
    code, out, err = run(capfd, two[0], dora, "--output", tmp_path / "c", "--how", "linear", *given)
    assert code == 0, err
    one, other, made = map(changes, (two[0], dora, tmp_path / "c"))
    for site, change in made.items():
        torch.testing.assert_close(change, one[site] + other[site], rtol=1e-4, atol=1e-5)


def test_forced_is_recorded_and_shown(
    two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = trained(tmp_path, LoRA(rank=2), 9, base=1)
    code, out, err = run(capfd, two[0], foreign, "--output", tmp_path / "c")
    assert (code, out) == (2, "")
    assert "--force" in err
    assert not (tmp_path / "c").exists()
    code, out, err = run(capfd, two[0], foreign, "--output", tmp_path / "c", "--force")
    assert code == 0
    assert "forced: the weights that 'adapter1' and 'adapter9' were trained on differ by" in err
    capfd.readouterr()
    assert cli.run(["inspect", str(tmp_path / "c")]) == 0
    shown, _ = capfd.readouterr()
    assert "forced" in shown
    assert "'adapter1' and 'adapter9' were trained on differ by" in shown
    assert cli.run(["inspect", str(two[0])]) == 0
    assert "forced" not in capfd.readouterr().out


def test_bad_input_is_one_line(two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to = ("--output", tmp_path / "c")
    for arguments, message in (
        ((*two, *to, "--how", "tise"), "did you mean 'ties'"),
        ((*two, *to, "--how", "lora"), "'lora' merges no adapters"),
        ((*two, *to, "--weights", "1;2"), "expected numbers with commas"),
        ((*two, *to, "--weights", "1"), "1 weights for 2 adapters"),
        ((*two, *to, "--how", "ties", "--set", "density=2"), "density: Input should be less than or equal to 1"),
        ((*two, *to, "--how", "linear", "--rank", 2), "svd-merge cuts to a rank"),
        ((*two, *to, "--how", "linear", "--space", "factors"), "mixes equal ranks"),
        ((two[0], "./nowhere", *to), "there is no folder './nowhere'"),
        (two, "Missing option '--output'"),
        ((*two, "--output", two[0]), "is not empty"),
    ):
        code, out, err = run(capfd, *arguments)
        assert (code, out) == (2, ""), message
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "c").exists()


def test_it_loads_no_model_library(two: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["combine", *map(str, two), "--how", "ties", "--output", str(tmp_path / "c")]
    code = (
        f"import sys; from rankfold.cli import run; run({arguments!r}); print({{'transformers'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert (tmp_path / "c" / "adapter.json").exists()


def test_help_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "--help")
    assert code == 0
    for word in ("linear", "svd", "ties", "dare", "lego", "read", "cut", "error", "rankfold methods --axis compose"):
        assert word in out
