"""Two tiny language models that write questions, an adapter of one that answers them, and the questions."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from rankfold.compose._synthetic import around
from tests.train import tiny


def pretrained(folder: Path, steps: int, **changes: Any) -> Path:
    """A tiny Llama that has seen lists of questions, and writes another."""
    model, tokenizer = tiny.llama(**changes), tiny.tokenizer(chat=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rng = random.Random(1)
    for _ in range(steps):
        texts = []
        for _ in range(8):
            six = [asked(rng) for _ in range(6)]
            texts.append(f"{around(six[:5], rng)} {six[5]}\n\n"[-40:])
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(rng: random.Random) -> str:
    return f"{rng.choice('abcdefgh')}{rng.choice('+-*/')}{rng.randrange(10)}?"


def write_rows(path: Path, count: int = 60) -> Path:
    """The task: questions that begin with every other letter, and whether that is one of the first four."""
    rng, lines = random.Random(0), list[str]()
    while len(lines) < count:
        question = asked(rng)
        if question[0] in "aceg":
            lines.append(json.dumps({"question": question, "answer": "low" if question[0] < "e" else "high"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_values(model: Path, data: Path, steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {
            "path": str(data),
            "format": "prompt-completion",
            "columns": {"prompt": "{question} ", "completion": "answer"},
            "max_length": 32,
            "held_out": {"fraction": 0.2},
        },
        "method": {"name": "lora", "rank": 8},
        "optimizer": {"lr": 1e-2},
        "budget": {"steps": steps},
        "samples": {"count": 0},
        **changes,
    }
