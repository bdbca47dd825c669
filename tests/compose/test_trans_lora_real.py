"""Trans-LoRA between two real models: SmolLM2 and what is left of it with fewer layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.compose.trans_lora import prepare, transfer
from rankfold.train import read_recipe, train
from rankfold.train.recipe_file import validate
from tests import assets

SHORT = ["budget.epochs=null", "evaluate.steps=99", "checkpoint.steps=99", "batch.size=4", "optimizer.lr=1e-3"]


def cut(folder: Path, layers: int) -> Path:
    """SmolLM2 with its first and last layers, as many as are asked for, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    kept = [*range(layers // 2), *range(30 - (layers - layers // 2), 30)]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.smollm2()).save_pretrained(folder)
    return folder


@torch.no_grad()
def loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    total = 0.0
    for row in rows:
        before = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        ids = torch.tensor([tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(before)] = -100
        total += float(model(input_ids=ids, labels=labels).loss)
    return total / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "of"), [(20, "target"), (20, "source")])
def test_between_two_real_models(layers: int, of: str, tmp_path: Path) -> None:
    """From the whole model to one with fewer layers, and the other way. The whole one writes the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, less = assets.smollm2(), cut(tmp_path / "cut", layers)
    source, target = (whole, less) if of == "target" else (less, whole)
    rows = sorted(assets.gsm8k_rows(), key=lambda row: len(row["question"]))[:44]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:36]))
    values = {
        "model": str(source),
        "data": {
            "path": str(data),
            "format": "prompt-completion",
            "columns": {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
            "max_length": 160,
            "held_out": {"fraction": 0.1},
        },
        "method": {"name": "lora", "rank": 8},
        "targets": ["q_proj", "v_proj"],
        "budget": {"steps": 10},
        "batch": {"size": 4},
        "evaluate": {"steps": 99},
        "checkpoint": {"steps": 99},
        "samples": {"count": 0},
    }
    recipe = validate(values)
    train(recipe, tmp_path / "run")
    kit = prepare(recipe, tmp_path / "kit", name="GSM8K", changes=["budget.steps=10", *SHORT], size=8)
    data.unlink()
    changes = ["budget.steps=10", *SHORT]
    options: dict[str, Any] = {"generator": str(whole), "count": 12, "max_new_tokens": 64, "size": 8}
    transfer(tmp_path / "run" / "adapter", kit, str(target), tmp_path / "out", changes=changes, **options)
    made = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert len(made["kept"]) == 12
    assert min(margin for _, margin in made["kept"]) > 0
    assert read_recipe(tmp_path / "out" / "recipe.yaml").model.path == str(target)

    tokenizer = AutoTokenizer.from_pretrained(target)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    alone = loss(model, tokenizer, rows[36:])
    rankfold.load(model, tmp_path / "out" / "adapter")
    moved = loss(model, tokenizer, rows[36:])
    print(f"{of} cut to {layers} layers: {made['drawn']} prompts drawn; loss {alone:.3f} alone, {moved:.3f} moved")
    if of == "target":  # the whole model has more to teach
        assert moved < alone
