"""Rows that are run again under the same adapters keep their stacked factors; nothing stale may ever be used."""

import copy

import pytest
import torch
from torch import nn

import rankfold

NAMES = ["a", None, "b", "a"]


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    for name in ("a", "b"):
        scrambled(rankfold.attach(model, rankfold.LoRA(rank=2), targets=["0", "2"], name=name))
    return model


def scrambled(adapter: rankfold.Adapter) -> rankfold.Adapter:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@torch.no_grad()
def together(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with rankfold.using(model, NAMES):
        return model(x)


@torch.no_grad()
def alone(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for name, row in zip(NAMES, x, strict=True):
        with rankfold.using(model, name):
            rows.append(model(row[None]))
    return torch.cat(rows)


def same(model: nn.Module, x: torch.Tensor) -> None:
    for _ in range(4):  # the stack is kept from the second forward on
        torch.testing.assert_close(together(model, x), alone(model, x), rtol=1e-12, atol=1e-12)


def changed_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        next(rankfold.adapters(model)["b"].parameters()).add_(1.0)


def trained_past_the_version_counter(model: nn.Module) -> None:
    """As optimisers do that write to `.data`."""
    rankfold.set_active(model, "b")
    model(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    for parameter in rankfold.adapters(model)["b"].parameters():
        parameter.data.add_(1.0)


def attached_anew(model: nn.Module) -> None:
    rankfold.detach(model, "b")
    scrambled(rankfold.attach(model, rankfold.LoRA(rank=3), targets=["0", "2"], name="b"))


def renamed(model: nn.Module) -> None:
    rankfold.rename(model, "a", "c")
    rankfold.rename(model, "b", "a")
    rankfold.rename(model, "c", "b")


@pytest.mark.parametrize("change", [changed_in_place, trained_past_the_version_counter, attached_anew, renamed])
def test_a_change_between_forwards_is_seen(change) -> None:
    model, x = net(), torch.randn(4, 6, dtype=torch.float64)
    same(model, x)
    before = together(model, x)
    change(model)
    same(model, x)
    assert (together(model, x) - before).abs().max() > 1e-3


def test_a_change_inside_one_block_is_seen() -> None:
    model, x = net(), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad(), rankfold.using(model, NAMES):
        for _ in range(3):
            before = model(x)
        changed_in_place(model)
        after = model(x)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, alone(model, x), rtol=1e-12, atol=1e-12)


def test_dropout_is_not_kept_away() -> None:
    model, x = net(), torch.randn(4, 6, dtype=torch.float64)
    same(model, x)
    adapter = rankfold.adapters(model)["a"]
    for delta in adapter.deltas.values():
        delta.dropout = 0.5
    adapter.train()
    assert not torch.equal(together(model, x)[0], together(model, x)[0])


def test_gradients_are_those_of_rows_alone_after_the_stack_was_kept() -> None:
    model, x = net(), torch.randn(4, 6, dtype=torch.float64)
    same(model, x)
    with rankfold.using(model, NAMES):
        model(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name, row in zip(NAMES, x, strict=True):
        with rankfold.using(model, name):
            y = model(row[None])
        if y.requires_grad:
            y.square().sum().backward()
    assert len(found) == 8
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_a_copy_has_stacks_of_its_own() -> None:
    model, x = net(), torch.randn(4, 6, dtype=torch.float64)
    same(model, x)
    twin = copy.deepcopy(model)
    changed_in_place(twin)
    same(twin, x)
    same(model, x)
