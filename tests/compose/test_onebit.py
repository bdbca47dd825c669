"""Adapters in b bits after training: sizes, values, and the adapter that a file of codes is."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import LoRA, OneBit
from rankfold.compose.compress import compress
from rankfold.core.levels import quantise
from tests.contract.nets import attach, example, net, scramble


def trained(rank: int = 4, kind: str = "linear") -> tuple[nn.Module, rankfold.Adapter]:
    model = net(kind, dtype=torch.float32)
    return model, scramble(attach(model, "lora", kind=kind, rank=rank))


def output(model: nn.Module, kind: str = "linear") -> Tensor:
    with torch.no_grad():
        return model(example(kind, dtype=torch.float32))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_each_matrix_is_its_own_levels(bits: int) -> None:
    _, adapter = trained()
    small, report = compress(adapter, OneBit(bits=bits))
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, quantise(adapter.state_dict()[name], bits))
        assert len(tensor.unique()) <= 2**bits
    assert report.code == 1 + sum(8 + (p.numel() * bits + 7) // 8 for p in adapter.parameters())
    assert {layer.kept for layer in report.layers.values()} == {1.0}
    assert small.method == LoRA(rank=4)


def test_more_bits_lose_less() -> None:
    _, adapter = trained()
    errors = {}
    for bits in (1, 2, 3, 4):
        _, report = compress(adapter, OneBit(bits=bits), f"of{bits}")
        errors[bits] = max(layer.error for layer in report.layers.values())
    assert errors[1] > 1.5 * errors[2] > 2 * errors[3] > 2.5 * errors[4] > 0


def test_bits_that_fill_no_byte(tmp_path: Path) -> None:
    """Three of five numbers in three bits: the authors' packer would drop the last."""
    model = nn.ModuleDict({"a": nn.Linear(5, 3)})
    other = copy.deepcopy(model)
    adapter = rankfold.attach(model, LoRA(rank=1), ["a"])
    with torch.no_grad():
        adapter.deltas["a"].B.copy_(torch.tensor([[1.0], [2], [5]]))
    path, report = compress(adapter, OneBit(bits=3), tmp_path / "small")
    loaded = rankfold.load(other, path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, quantise(adapter.state_dict()[name], 3))
    assert report.code == 1 + 2 * 8 + (5 * 3 + 7) // 8 + (3 * 3 + 7) // 8


def test_experts_have_levels_each(tmp_path: Path) -> None:
    model, adapter = trained(kind="experts")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter[0] *= 100
    path, _ = compress(adapter, "onebit", tmp_path / "small")
    other = net("experts", dtype=torch.float32)
    loaded = rankfold.load(other, path)
    for name, tensor in loaded.state_dict().items():
        assert max(len(matrix.unique()) for matrix in tensor) == 2
        assert float(tensor[0].std()) > 20 * float(tensor[1].std()), name
    compress(adapter, "onebit", "beside")
    with rankfold.using(model, "beside"):
        assert torch.equal(output(model, "experts"), output(other, "experts"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    adapter = rankfold.attach(model, LoRA(rank=2), ["fc1", "fc2"], dtype=dtype)
    scramble(adapter)
    for how in ("onebit", "compeft"):
        small, _ = compress(adapter, how, how)
        path, _ = compress(adapter, how, tmp_path / how)
        other = net(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        loaded = rankfold.load(other, path).state_dict()
        assert {tensor.dtype for tensor in loaded.values()} == {dtype}
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in small.state_dict().items())
