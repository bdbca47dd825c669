"""`rankfold skills`: a library on disk, and mixtures of what it holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import LoRA, cli
from tests.train import tiny

SKILLS = {"left": ("q_proj", 2), "up": ("down_proj", 3)}


def run(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.run(["skills", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, " ".join(err.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, on other layers and of other ranks, that do something."""
    place, found = tmp_path_factory.mktemp("saved"), {}
    for name, (target, rank) in SKILLS.items():
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        adapter = rankfold.attach(model, LoRA(rank=rank, alpha=8), [target], name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rank)))
        found[name] = rankfold.save(model, place / name, name)
    return found


@pytest.fixture
def library(saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    for name, folder in saved.items():
        assert run(capfd, "add", tmp_path / "library", folder, "--about", f"goes {name}")[0] == 0
    return tmp_path / "library"


def logits(base: Path, *adapters: tuple[Path, float]) -> torch.Tensor:
    """Of the base with a weighted sum of saved LoRAs written into its weights by hand."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for folder, weight in adapters:
        other: Any = AutoModelForCausalLM.from_pretrained(base)
        for site, delta in rankfold.load(other, folder).deltas.items():
            with torch.no_grad():
                model.get_submodule(site).weight += weight * delta.scale * (delta.B @ delta.A)
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def test_what_a_library_holds(library: Path, saved: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capfd, "list", library, "--json")
    assert [(one["name"], one["method"], one["about"]) for one in json.loads(out)] == [
        ("left", "lora", "goes left"), ("up", "lora", "goes up"),
    ]  # fmt: skip
    assert "goes left" in run(capfd, "list", library)[1]
    _, out, _ = run(capfd, "describe", library, "up", "--json")
    assert json.loads(out)["layers"] == 2
    assert run(capfd, "remove", library, "up")[0] == 0
    assert (saved["up"] / "adapter.safetensors").is_file()  # the library had a copy
    code, _, said = run(capfd, "describe", library, "up")
    assert (code, "has no skill 'up'; it has: left" in said) == (2, True)
    code, _, said = run(capfd, "add", library, saved["left"])
    assert (code, "has a skill 'left' already" in said) == (2, True)
    assert "there is no library" in run(capfd, "list", library / "elsewhere")[2]


def test_given_weights_are_the_weighted_sum(
    library: Path, saved: dict[str, Path], base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed"
    shared = ["compose", library, "left", "up", "--model", base, "--output"]
    assert run(capfd, *shared, out, "--weights", "0.7,-1.3")[0] == 0
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    rankfold.load(model, out)
    with torch.no_grad():
        found = model(input_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(found, logits(base, (saved["left"], 0.7), (saved["up"], -1.3)), rtol=0, atol=1e-5)
    other = tmp_path / "other"
    assert "--weights: 1 numbers for 2 skills" in run(capfd, *shared, other, "--weights", "1")[2]
    assert "expected numbers with commas" in run(capfd, *shared, other, "--weights", "a,b")[2]
    assert "give --recipe to learn the weights" in run(capfd, "compose", library, "left", "--output", other)[2]
    assert "has no skill 'down'" in run(capfd, "compose", library, "down", "--model", base, "--output", other)[2]


def test_learnt_weights_alone_train(
    library: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = tiny.recipe_values(base, tiny.write_questions(tmp_path / "q.jsonl"), optimizer={"lr": 0.1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "mixed"
    shared = ["compose", library, "left", "up", "--recipe", tmp_path / "recipe.yaml"]
    code, said, _ = run(capfd, *shared, "--output", out, "--json")
    assert code == 0
    learnt = json.loads(said)
    assert learnt["after"] < learnt["before"]
    assert min(abs(weight - 0.5) for weight in learnt["weights"].values()) > 0.05
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapter: Any = rankfold.load(model, out / "adapter")
    assert adapter.shared.alpha.tolist() == pytest.approx(list(learnt["weights"].values()))
    assert adapter.num_parameters() == 2
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "metrics.jsonl"]
    again = run(capfd, *shared, "--output", out)
    assert (again[0], "is not empty" in again[2]) == (2, True)
