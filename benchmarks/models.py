"""The small Llamas that the benchmarks run on, with random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 2000


def llama(layers: int, width: int) -> LlamaForCausalLM:
    """A frozen float32 Llama with 7 linear layers a block and an intermediate width of 2.6875 times the width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
