"""What blocks in a row are called with, found without running them for every batch."""

import itertools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold.core.calibration.accumulators import CovarianceAccumulator
from rankfold.core.calibration.blocks import by_block


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()  # fmt: skip


def test_only_the_first_batch_runs_through_all_blocks_before_the_first_window() -> None:
    model = tiny()
    batches = [{"input_ids": torch.randint(0, 50, (2, n))} for n in (7, 5, 7)]
    with torch.no_grad():
        hidden = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    ran = dict.fromkeys(range(3), 0)
    heads = 0

    def count(i: int) -> None:
        ran[i] += 1

    def head(*_: Any) -> None:
        nonlocal heads
        heads += 1

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: count(i))
    model.lm_head.register_forward_hook(head)
    windows = by_block(model, batches, [f"model.layers.{i}.mlp.up_proj" for i in range(3)])
    first = next(windows)
    assert ran == {0: 1, 1: 1, 2: 1}
    assert heads == 1
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    for i, window in enumerate(itertools.chain([first], windows)):  # a window's calls go on to the next one
        for call, states in zip(window.calls, hidden, strict=True):
            torch.testing.assert_close(call.x, states[i])
            torch.testing.assert_close(window.run(call), states[i + 1] if i < 2 else window.run(call, states[2]))


def test_a_blocks_own_forward_comes_back() -> None:
    model = tiny()
    block = model.model.layers[1]
    own = block.forward = type(block).forward.__get__(block)
    batches = [{"input_ids": torch.randint(0, 50, (1, 4))} for _ in range(2)]
    next(by_block(model, batches, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]))
    assert block.forward is own


def test_second_moments_of_many_features() -> None:
    X, sums = torch.randn(40, 700, dtype=torch.float64), CovarianceAccumulator()
    sums.add(X[:15])
    sums.add(X[15:])
    torch.testing.assert_close(sums.result(2)["value"], X.mT @ X / 40)
