"""Two processes: data parallel and sharded, against one process with the whole batch."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankfold.train import train
from rankfold.train.recipe_file import validate, write_recipe
from rankfold.train.watch import read_metrics
from tests.train import tiny

pytestmark = pytest.mark.slow


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2")


def launch(module: str, recipe: Path, output: Path, *options: str, launcher: tuple[str, ...] = TORCHRUN) -> None:
    command = [sys.executable, "-m", *launcher, "-m", module]
    subprocess.run(
        [*command, "train", str(recipe), "--output", str(output), *options, "--debug"], check=True, timeout=300
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path, questions: Path) -> tuple[Path, Path]:
    """A run of one process, and the recipe that gives two processes half of its batch each."""
    place = tmp_path_factory.mktemp("alone")
    values: dict[str, Any] = tiny.recipe_values(
        llama_dir, questions, method={"name": "lora", "rank": 4}, checkpoint={"steps": 2}, callbacks=["orthogonality"]
    )
    train(validate({**values, "batch": {"size": 8}}), place / "run")
    recipe = place / "recipe.yaml"
    recipe.write_text(write_recipe(validate({**values, "batch": {"size": 4}})))
    return place / "run", recipe


@pytest.mark.parametrize("module", ["rankfold", "tests.train.sharded"], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(module: str, alone: tuple[Path, Path], tmp_path: Path) -> None:
    run, recipe = alone
    launch(module, recipe, tmp_path / "two")
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, tmp_path / "two"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        for figure in ("held_out_loss", "held_out_count", "loss", "grad_norm", "tokens"):
            assert one.get(figure, 0) == pytest.approx(two.get(figure, 0), rel=1e-4), (one["step"], figure)
    whole = load_file(run / "adapter" / "adapter.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "adapter" / "adapter.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4, msg=name)


def test_accelerate_launch_trains_as_ever(alone: tuple[Path, Path], tmp_path: Path) -> None:
    """On processors alone it starts one process, unless there is an MPI; several are started by torchrun above."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(alone[1].read_text().replace("size: 4", "size: 8", 1))
    accelerate = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    launch("rankfold", recipe, tmp_path / "launched", launcher=accelerate)
    ours, theirs = (load_file(path / "adapter" / "adapter.safetensors") for path in (alone[0], tmp_path / "launched"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("module", ["rankfold", "tests.train.sharded"], ids=["ddp", "fsdp"])
def test_two_processes_go_on_where_they_stopped(module: str, alone: tuple[Path, Path], tmp_path: Path) -> None:
    launch(module, alone[1], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "checkpoint-6")
    launch(module, alone[1], tmp_path / "stopped", "--resume")
    whole, stopped = (load_file(tmp_path / n / "adapter" / "adapter.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


# ---- optimisers of Rankfold's own, and models trained in full


def close(one: Path, two: Path) -> None:
    """The same losses and the same weights, up to the order of sums."""
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (one, two))
    for a, b in zip(ours, theirs, strict=True):
        for figure in ("held_out_loss", "loss"):
            assert a.get(figure, 0) == pytest.approx(b.get(figure, 0), rel=1e-4), (a["step"], figure)
    (file,) = (path.relative_to(one) for path in one.glob("*/*.safetensors"))
    whole, parts = load_file(one / file), load_file(two / file)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


GALORE = {"name": "galore", "rank": 2, "every": 2, "scale": 1.0, "lr": 0.01}
MEZO = {"name": "mezo", "lr": 1e-3, "clip": 0}


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("rankfold", {"optimizer": GALORE}),
        ("rankfold", {"optimizer": MEZO, "callbacks": ["orthogonality"]}),
        ("rankfold", {"optimizer": {**GALORE, "rank": 8}, "method": "full"}),
        ("tests.train.sharded", {"method": "full"}),
        ("tests.train.sharded", {"optimizer": GALORE}),
        ("tests.train.sharded", {"optimizer": {**GALORE, "rank": 8}, "method": "full"}),
        ("tests.train.sharded", {"optimizer": {"name": "gradnormlorp", "rank": 8, "lr": 0.01}, "method": "full"}),
        ("tests.train.sharded", {"optimizer": {"name": "adam8bit", "lr": 0.01}, "method": "full"}),
        ("tests.train.sharded", {"optimizer": {"name": "lora-rite", "lr": 0.01}}),
        ("tests.train.sharded", {"optimizer": MEZO}),
    ],
    ids=[
        *("galore-ddp", "mezo-ddp", "full-galore-ddp", "full-adamw-fsdp"),
        *("galore-fsdp", "full-galore-fsdp", "full-gradnormlorp-fsdp", "full-adam8bit-fsdp", "rite-fsdp", "mezo-fsdp"),
    ],
)
def test_memory_efficient_runs_train_as_one_process(
    module: str, changes: dict[str, Any], tmp_path: Path, llama_dir: Path, questions: Path
) -> None:
    values = tiny.recipe_values(llama_dir, questions, **{"method": {"name": "lora", "rank": 4}, **changes})
    values |= {"budget": {"steps": 3}, "checkpoint": {"steps": 3}}
    train(validate({**values, "batch": {"size": 8}}), tmp_path / "one")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_recipe(validate({**values, "batch": {"size": 4}})))
    launch(module, recipe, tmp_path / "two")
    close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("module", "optimizer", "message"),
    [
        (
            "tests.train.sharded",
            {**MEZO, "name": "sparse-mezo"},
            "a projection of a shard is no shard of the projection",
        ),
        ("rankfold", {**GALORE, "per_layer": True, "clip": 0}, "before processes could exchange gradients"),
    ],
    ids=["fsdp", "per-layer"],
)
def test_what_several_processes_cannot_do_is_refused(
    module: str, optimizer: dict[str, Any], message: str, tmp_path: Path, llama_dir: Path, questions: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_recipe(validate(tiny.recipe_values(llama_dir, questions, optimizer=optimizer))))
    command = [sys.executable, "-m", *TORCHRUN, "-m", module, "train", str(recipe), "--output", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert message in ended.stderr
