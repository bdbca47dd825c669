"""`rankfold train-generator` and `rankfold generate-adapter`, from recipes to adapters."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import DoRA, LoRA
from rankfold.cli import generate_adapter
from rankfold.compose.generator import load_generator
from rankfold.compose.icm_lora import examples
from rankfold.train.generators import GeneratorRecipe, train_generator
from rankfold.train.recipe_file import read_recipe
from tests.train.tiny import write_llama

READER = {"name": "generative-adapter", "rank": 8, "inner": 8, "kept": 4, "alpha": 16, "chunk": 16}


def run(*arguments: str) -> int:
    app = typer.Typer()
    generate_adapter.register(app)
    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "all.txt"
    words = ["red", "green", "blue", "north", "south", "one", "two"]
    path.write_text("\n\n".join(" ".join(rng.choice(words) for _ in range(30)) for _ in range(40)))
    return path


def write(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def reading(folder: Path, base: Path, text: Path, **changes: Any) -> Path:
    data = {"path": str(text), "format": "text", "max_length": 32, "held_out": {"fraction": 0.2}}
    values = {"generator": READER, "model": str(base), "data": data, "optimizer": {"lr": 0.01}, "seed": 3}
    return write(folder / "reader.yaml", **{**values, "budget": {"steps": 6}, "batch": {"size": 4}, **changes})


def test_reader(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, made = reading(tmp_path, base, text), tmp_path / "reader"
    assert run("train-generator", str(recipe), "--output", str(made), "--set", "budget.steps=8", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["after"] < report["before"]) == (8, True)
    assert report["parameters"] == 2 * (8 * (32 + 32) + 8 * (32 + 32) + 32)
    names = {path.name for path in made.iterdir()}
    assert names == {"generator", "report.json", "loss.png", "metrics.jsonl", "recipe.yaml", "checkpoints"}
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == set(range(1, 9))

    context, out = tmp_path / "context.txt", tmp_path / "adapter"
    context.write_text(text.read_text()[:400])
    assert run("generate-adapter", "--generator", str(made), "--context", str(context), "--output", str(out)) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapter = rankfold.load(model, out)
        assert not torch.allclose(model(input_ids=ids).logits, plain)
    assert (adapter.name, adapter.method) == ("generated", LoRA(rank=8, alpha=16))
    generator = load_generator(made / "generator")
    same = tmp_path / "same"
    options = ["--generator", str(made / "generator"), "--context", str(context), "--output", str(same)]
    with pytest.raises(rankfold.RankfoldError, match="--model: name the base model"):
        run("generate-adapter", *options)
    capsys.readouterr()
    assert run("generate-adapter", *options, "--model", str(base), "--name", "again", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["ranks"].values()) == {8}
    assert rankfold.load(model, same).name == "again"
    again = model._rankfold_state.adapters["again"]
    for site, delta in adapter.deltas.items():
        assert torch.equal(again.deltas[site].A, delta.A)
    assert list(generator.about.sites) == list(adapter.deltas)


def test_two_files_are_read_one_after_the_other(base: Path, text: Path, tmp_path: Path) -> None:
    made = tmp_path / "reader"
    train_generator(read_recipe(reading(tmp_path, base, text), schema=GeneratorRecipe), made)
    words = text.read_text()
    parts = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "both.txt"]
    for path, part in zip(parts, (words[:200], words[200:400], f"{words[:200]}\n\n{words[200:400]}"), strict=True):
        path.write_text(part)
    shared = ["generate-adapter", "--generator", str(made)]
    run(*shared, "--context", str(parts[0]), "--context", str(parts[1]), "--output", str(tmp_path / "two"))
    run(*shared, "--context", str(parts[2]), "--output", str(tmp_path / "one"))
    one, two = ((tmp_path / name / "adapter.safetensors").read_bytes()[-2000:] for name in ("one", "two"))
    assert one == two


def test_stopped_and_gone_on_is_the_same_to_the_bit(base: Path, text: Path, tmp_path: Path) -> None:
    recipe = read_recipe(reading(tmp_path, base, text, checkpoint={"steps": 3}), schema=GeneratorRecipe)
    train_generator(recipe, tmp_path / "whole")
    half = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"steps": 3})})
    # A shorter run would decay its rate sooner: stop the same run by what was kept at its third step.
    train_generator(recipe, tmp_path / "stopped")
    for path in (tmp_path / "stopped" / "checkpoints").iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    train_generator(recipe, tmp_path / "stopped", resume=True)
    whole, gone_on = (load_generator(tmp_path / name / "generator").state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)
    other = half.model_copy(update={"seed": 4})
    with pytest.raises(rankfold.RankfoldError, match="another recipe, different in: seed"):
        train_generator(other, tmp_path / "stopped", resume=True)
    with pytest.raises(rankfold.RankfoldError, match="holds a run already"):
        train_generator(recipe, tmp_path / "stopped")


def adapters(base: Path, folder: Path, level: float, count: int = 4) -> list[str]:
    """Adapters of one task: rank 2, about `level`."""
    paths = []
    for i in range(count):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        adapter = rankfold.attach(model, LoRA(rank=2), ["q_proj"], seed=i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(level + 0.1 * torch.randn(parameter.shape))
        paths.append(str(rankfold.save(model, folder / f"{level}-{i}")))
    return paths


def test_tasks(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Examples of a task give an adapter like the task's, in the layers and of the rank that those have."""
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join("0123456789" * i for i in range(1, 9)))
    tasks = {
        "words": {"adapters": adapters(base, tmp_path / "zoo", 1.0), "examples": str(text)},
        "digits": {"adapters": adapters(base, tmp_path / "zoo", -1.0), "examples": str(other)},
    }
    config = {"name": "icm-lora", "channels": [4, 8], "latent": 8, "canonical": False, "samples": 3}
    recipe = write(
        tmp_path / "zoo.yaml", generator=config, model=str(base), tasks=tasks, budget={"steps": 5}, batch={"size": 3}
    )
    made = tmp_path / "made"
    assert run("train-generator", str(recipe), "--output", str(made), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["train_rows"], report["held_out_rows"]) == (6, 2)
    for name, level in (("words", 1.0), ("digits", -1.0)):
        out = tmp_path / name
        run("generate-adapter", "--generator", str(made), "--context", tasks[name]["examples"], "--output", str(out))
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        adapter = rankfold.load(model, out)
        assert adapter.method == LoRA(rank=2)
        assert [site.rpartition(".")[2] for site in adapter.deltas] == ["q_proj"] * 2
        means = [float(delta.B.mean().detach()) for delta in adapter.deltas.values()]
        assert means == pytest.approx([level, level], abs=0.2)
    shared = ["generate-adapter", "--generator", str(made), "--context", str(text), "--output", str(tmp_path / "x")]
    with pytest.raises(rankfold.RankfoldError, match="no task 'letters'; there are: digits, words"):
        run(*shared, "--task", "letters")


def test_a_zoo_of_what_is_no_product(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DoRAs are read as the best LoRAs of their rank, and what that loses is said."""
    paths, lost = [], []
    for i in range(3):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        adapter = rankfold.attach(model, DoRA(rank=2), ["q_proj"], seed=i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape)).add_(0.1 * torch.randn(parameter.shape))
        for layer in model.model.layers:
            before = layer.self_attn.q_proj.weight.detach().clone()
            rankfold.merge(model)
            S = torch.linalg.svdvals(layer.self_attn.q_proj.weight.detach() - before)
            rankfold.unmerge(model)
            lost.append(float(S[2:].norm() / S.norm()))
        paths.append(str(rankfold.save(model, tmp_path / f"{i}")))
    tasks = {"words": {"adapters": paths, "examples": str(text)}}
    config = {"name": "icm-lora", "channels": [4, 8], "latent": 8, "samples": 3}
    recipe = write(
        tmp_path / "zoo.yaml", generator=config, model=str(base), tasks=tasks, budget={"steps": 2}, batch={"size": 2}
    )
    assert run("train-generator", str(recipe), "--output", str(tmp_path / "made"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["read"]["words"] == pytest.approx(max(lost), rel=1e-3)
    assert min(lost) > 0.1
    generator = load_generator(tmp_path / "made" / "generator")
    assert {record.method["rank"] for record in generator.about.sites.values()} == {2}


def test_what_a_recipe_may_not_ask(base: Path, text: Path, tmp_path: Path) -> None:
    tasks = {"one": {"adapters": ["nowhere"], "examples": str(text)}}
    for changes, message in (
        ({"generator": "lora"}, "'lora' generates no adapters"),
        ({"data": None}, "data: generative-adapter needs it"),
        ({"tasks": tasks}, "tasks: generative-adapter has no use for it"),
        ({"generator": "icm-lora", "data": None, "tasks": tasks, "modle": 1}, "modle: unknown key; did you mean model"),
    ):
        with pytest.raises(rankfold.RankfoldError, match=message):
            read_recipe(reading(tmp_path, base, text, **changes), schema=GeneratorRecipe)
    for changes, message in (
        ({"generator": {**READER, "rang": 3}}, "generator: generative-adapter: rang"),
        ({"generator": {**READER, "chunk": 24}}, "data.max_length: 32 tokens are not two or more whole chunks of 24"),
        ({"generator": {**READER, "rank": 64}}, "rank 64 is over the size"),
        ({"targets": ["o_porj"]}, "matches no layer"),
        ({"generator": "icm-lora", "data": None, "tasks": tasks}, "tasks.one.adapters: "),
    ):
        recipe = read_recipe(reading(tmp_path, base, text, **changes), schema=GeneratorRecipe)
        with pytest.raises(rankfold.RankfoldError, match=message):
            train_generator(recipe, tmp_path / "out")


EXAMPLES = Path(__file__).parents[2] / "examples" / "generators"


def test_the_zoos_recipes_keep_the_adapters_that_it_reads() -> None:
    zoo = read_recipe(EXAMPLES / "zoo.yaml", schema=GeneratorRecipe)
    assert zoo.tasks is not None
    for task, given in zoo.tasks.items():
        recipe = read_recipe(EXAMPLES / "zoo" / f"{task}.yaml")
        assert given.adapters == (f"runs/{task}",)
        assert recipe.model == zoo.model
        assert recipe.checkpoint.steps == 1
        assert recipe.checkpoint.keep > 10
        assert len(examples((EXAMPLES.parents[1] / given.examples).read_text())) >= 8


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_recipes_are_valid(path: Path) -> None:
    assert read_recipe(path, schema=GeneratorRecipe).generator.name in ("generative-adapter", "icm-lora")


@pytest.mark.slow
def test_a_real_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2: the loss on completion and reconstruction falls, and the adapter it makes of a text loads."""
    from tests.assets import smollm2

    smollm2()
    made, context = tmp_path / "reader", tmp_path / "context.txt"
    few = ["--set", "data.held_out.limit=8", "--set", "budget.steps=8", "--set", "evaluate.steps=8"]
    assert run("train-generator", str(EXAMPLES / "reader.yaml"), "--output", str(made), *few, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["after"] < report["before"] - 0.02
    context.write_text("Tom has 3 apples and buys 4 more. Now he has 3 + 4 = <<3+4=7>>7 apples.\n#### 7\n" * 4)
    out = tmp_path / "adapter"
    assert run("generate-adapter", "--generator", str(made), "--context", str(context), "--output", str(out)) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    assert len(rankfold.load(model, out).deltas) == 30
