"""A random Llama of a few thousand parameters, and text for it."""

import torch


def tiny_llama(dtype=torch.float32, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    settings |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype)


def tokens(seed=0, rows=2, length=12):
    ids = torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def answer(statistic, value, name="0"):
    """A calibration that found this tensor as the value of `statistic` at the site `name`."""
    from rankfold.core.calibration import Calibration

    return Calibration({name: {statistic: (0, "0.")}}, [{"0.value": torch.as_tensor(value)}])
