"""Models, tokenizers and data small enough to train in seconds, written to a folder as users have them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and the marks of a chat: any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def write_llama(folder: Path) -> Path:
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """An encoder without a classification head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_vit(folder: Path) -> Path:
    """A vision backbone without a classification head, for pictures of 28 x 28."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def write_questions(path: Path, count: int = 60) -> Path:
    """Rows `question`, `answer`, `kind` as JSON Lines."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randrange(10), rng.randrange(10)
            kind = "high" if a >= 5 else "low"
            print(json.dumps({"question": f"{a}+{b}?", "answer": f"{a + b}", "kind": kind}), file=file)
    return path


def recipe_values(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that runs in a second or two: prompt-completion on the questions."""
    return {
        "model": str(model),
        "data": {
            "path": str(data),
            "format": "prompt-completion",
            "columns": {"prompt": "question", "completion": "answer"},
            "max_length": 32,
            "held_out": {"fraction": 0.2},
        },
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "optimizer": {"lr": 0.01},
        "budget": {"steps": 6},
        "batch": {"size": 4},
        "samples": {"count": 2, "max_new_tokens": 4},
        **changes,
    }
