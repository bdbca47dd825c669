"""A tiny language model and a folder of adapters of many methods and ranks on it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold

KINDS = {
    "lora4": ("lora", {"rank": 4}),
    "lora8": ("lora", {"rank": 8}),
    "lora3": ("lora", {"rank": 3, "rslora": True}),
    "pissa": ("lora", {"rank": 4}),
    "dora": ("dora", {"rank": 4}),
    "vera": ("vera", {"rank": 8}),
    "ia3": ("ia3", {}),
}


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(model: Any, path: Path, method: str, seed: int = 0, **hyperparameters: Any) -> None:
    """An adapter that changes what the model says, in a folder."""
    init = rankfold.build("pissa") if path.name == "pissa" else None
    adapter = rankfold.attach(model, rankfold.build(method, **hyperparameters), name=path.name, init=init)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    rankfold.save(model, path, name=path.name)
    rankfold.detach(model)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_llama()
    for seed, (name, (method, options)) in enumerate(KINDS.items()):
        save_adapter(model, folder / name, method, seed, **options)
    return folder


@pytest.fixture
def model() -> Any:
    return tiny_llama()
