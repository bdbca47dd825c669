"""Merging as PEFT's `add_weighted_adapter`, wherever the two mean the same."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import DARE, TIES, LoRA, SVDMerge, TaskArithmetic
from rankfold.compose.dare import dropped
from tests.peers.pairs import DOUBLE, Net

NAMES, WEIGHTS = ["a", "b", "c"], [0.6, -0.9, 1.4]
ALPHAS = {"a": 6, "b": 2, "c": 3}


def both(
    targets: list[str], ranks: dict[str, int] | None = None, alphas: dict[str, int] = ALPHAS
) -> tuple[nn.Module, list[rankfold.Adapter]]:
    """PEFT's model and our adapters: three LoRAs of different scales with the same numbers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, theirs = Net().to(DOUBLE), None
    ours = copy.deepcopy(base)
    adapters = []
    for name in NAMES:
        rank, alpha = (ranks or {}).get(name, 3), alphas[name]
        adapters.append(rankfold.attach(ours, LoRA(rank=rank, alpha=alpha), targets, name))
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if theirs is None:
                theirs = get_peft_model(base, config, name, autocast_adapter_dtype=False)
            else:
                theirs.add_adapter(name, config)
    assert theirs is not None
    theirs.to(DOUBLE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, adapter in zip(NAMES, adapters, strict=True):
            for site, delta in adapter.deltas.items():
                for mine, their in zip((delta.B, delta.A), factors(theirs, site, name), strict=True):
                    mine.copy_(torch.randn(mine.shape, generator=generator, dtype=DOUBLE))
                    their.copy_(mine.view(their.shape))
    return theirs, adapters


def factors(model: Any, site: str, name: str) -> tuple[Tensor, Tensor]:
    layer: Any = model.get_submodule(f"base_model.model.{site}")
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return layer.lora_embedding_B[name], layer.lora_embedding_A[name]
    return layer.lora_B[name].weight, layer.lora_A[name].weight


def compared(theirs: Any, ours: rankfold.Adapter) -> Iterator[tuple[Tensor, Tensor]]:
    """ΔW of each layer, PEFT's and ours."""
    for site, delta in ours.deltas.items():
        B, A = factors(theirs, site, "merged")
        yield (B.flatten(1) @ A.flatten(1)).detach(), (delta.scale * delta.B @ delta.A).detach()


def same(
    targets: list[str],
    kind: str,
    rule: Any,
    weights: list[float],
    mine: Any = None,
    alphas: Any = ALPHAS,
    **options: Any,
) -> None:
    theirs, adapters = both(targets, alphas=alphas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1
        theirs.add_weighted_adapter(NAMES, weights, "merged", kind, **options)  # type: ignore[operator]
    rank = options.get("svd_rank")
    ours, _ = rankfold.combine(adapters, rule, weights if mine is None else mine, rank=rank)
    for their, our in compared(theirs, ours):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)  # PEFT's weights are float32
        assert their.abs().max() > 0.1


EVERY = ["emb", "up", "conv", "down"]


def test_cat_is_the_exact_sum() -> None:
    same(["up", "down"], "cat", TaskArithmetic(), WEIGHTS)


def test_linear_mixes_factors() -> None:
    same(EVERY, "linear", TaskArithmetic(space="factors"), WEIGHTS)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_svd(rank: int) -> None:
    same(["up", "down"], "svd", SVDMerge(), WEIGHTS, svd_rank=rank)


def test_ties_of_factors() -> None:
    """Without trimming, which PEFT does tensor by tensor, and with one scale, which it leaves out when it elects signs.

    Its weights are our N w.
    """
    rule, one = TIES(space="factors", density=1), dict.fromkeys(NAMES, 6)
    same(EVERY, "ties", rule, [0.6] * 3, [0.2] * 3, one, density=1.0)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_of_products(density: float) -> None:
    """On a single layer trimming the tensor is trimming the model."""
    rule = TIES(density=density, iterations=None)
    same(["up"], "ties_svd", rule, [1.2] * 3, [0.4] * 3, density=density, svd_rank=5)


def test_dare_of_nothing() -> None:
    same(["up", "down"], "dare_linear", DARE(drop=0, space="factors"), WEIGHTS, density=1.0)
    same(["up"], "dare_linear_svd", DARE(drop=0, iterations=None), WEIGHTS, density=1.0, svd_rank=4)
    same(["up"], "dare_ties_svd", DARE(drop=0, rule="ties", iterations=None), [0.9] * 3, [0.3] * 3, density=1.0,
         svd_rank=4)  # fmt: skip


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_entries_are_dropped_alike(p: float) -> None:
    """From one seed, PEFT's stream of random numbers drops what ours does, and rescales the rest as we do."""
    from peft.utils.merge_utils import random_pruning

    tau = torch.randn(7, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    theirs = random_pruning(tau, 1 - p, rescale=True)
    torch.testing.assert_close(dropped(tau, p, torch.Generator().manual_seed(5)), theirs)


def test_peft_refuses_what_ours_can_do() -> None:
    """PEFT's linear needs equal ranks; so do ours of factors, while products can be merged."""
    theirs, adapters = both(["up"], {"b": 5})
    with pytest.raises(ValueError, match="same r"):
        theirs.add_weighted_adapter(NAMES, WEIGHTS, "merged", "linear")  # type: ignore[operator]
    with pytest.raises(rankfold.RankfoldError, match="mixes equal ranks"):
        rankfold.combine(adapters, TaskArithmetic(space="factors"), WEIGHTS)
    _, report = rankfold.combine(adapters, "linear", WEIGHTS)
    assert report["up"].rank == 11
