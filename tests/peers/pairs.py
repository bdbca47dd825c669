"""PEFT and Rankfold on two copies of one small model: equal parameters in, equal numbers out."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankfold

DOUBLE = torch.float64


class Net(nn.Module):
    """Ids → embedding → linear → convolution over the sequence → linear; every kind that PEFT has a LoRA for."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 18)
        self.conv = nn.Conv2d(18, 12, (3, 1), padding=(1, 0))
        self.down = nn.Linear(12, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.emb(ids)))
        h = torch.tanh(self.conv(h.mT[..., None])).squeeze(-1).mT
        return self.down(h)


def pair(config: Any, method: rankfold.Method, targets: list[str]) -> tuple[nn.Module, nn.Module, rankfold.Adapter]:
    """PEFT's model, ours, and our adapter, on copies of the same float64 model."""
    from peft import get_peft_model

    torch.manual_seed(0)
    base = Net().to(DOUBLE)
    ours = copy.deepcopy(base)
    adapter = rankfold.attach(ours, method, targets=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(base, config, autocast_adapter_dtype=False).to(DOUBLE)
    return theirs, ours, adapter


Names = Callable[[nn.Module], Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]]]


def same_training(
    theirs: nn.Module, ours: nn.Module, adapter: rankfold.Adapter, names: Names, atol: float = 1e-10
) -> None:
    """Random equal parameters; equal outputs, gradients, and parameters after a step of Adam.

    `names(layer)` gives, for a layer of PEFT's, our name of each parameter → (PEFT's tensor, our layout → PEFT's).
    """
    links = list(_links(theirs, adapter, names))
    assert sum(their.numel() for _, their, _ in links) == adapter.num_parameters()
    assert {id(their) for _, their, _ in links} == {id(p) for p in theirs.parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, their, layout in links:
            mine.add_(0.2 * torch.randn(mine.shape, generator=generator, dtype=DOUBLE))
            their.copy_(layout(mine))
    ids = torch.randint(0, 20, (3, 7), generator=generator)
    up = torch.randn(3, 7, 6, generator=generator, dtype=DOUBLE)

    def same(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a.detach(), b.detach(), atol=atol, rtol=0)

    optimizers = [torch.optim.AdamW([t[i] for t in links], lr=0.05, eps=1e-3) for i in (0, 1)]
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(ids))
        (outputs[-1] * up).sum().backward()
    same(*outputs)
    with rankfold.using(ours, None):
        assert (outputs[0] - ours(ids)).abs().max() > 1e-3, "the adapters change nothing"
    for mine, their, layout in links:
        assert mine.grad is not None
        assert mine.grad.any()
        same(layout(mine.grad), their.grad)
    for optimizer in optimizers:
        optimizer.step()
    for mine, their, layout in links:
        same(layout(mine), their)
    same(ours(ids), theirs(ids))
    expected = ours(ids).detach()
    same(theirs.merge_and_unload()(ids), expected)
    rankfold.merge(ours)
    same(ours(ids), expected)


def _links(
    theirs: nn.Module, adapter: rankfold.Adapter, names: Names
) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
    for site, delta in adapter.deltas.items():
        for name, (their, layout) in names(theirs.get_submodule(f"base_model.model.{site}")).items():
            yield delta.get_parameter(name), their, layout


def same_layout(tensor: Tensor) -> Tensor:
    return tensor
