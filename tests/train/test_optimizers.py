"""The recipe key `optimizer:` with an optimiser of Rankfold's own."""

from typing import Any, ClassVar

import pytest
import torch

import rankfold
from rankfold.errors import RankfoldError
from rankfold.optim import Subspace, Svd
from rankfold.train.plan import optimizer_class
from rankfold.train.recipe import Optimizer


class Momentum(rankfold.Optimizer):
    slug: ClassVar[str] = "test-momentum"
    title: ClassVar[str] = "Momentum"
    source: ClassVar[str] = "none"

    momentum: float = 0.5

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, momentum=self.momentum)


def test_a_slug_makes_the_optimiser_with_its_hyperparameters() -> None:
    make, options = optimizer_class(Optimizer(name="test-momentum", lr=0.1, weight_decay=0.2, momentum=0.75))
    own, others = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = make([{"params": [own], "lr": 0.3}, {"params": [others]}], **options)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
    assert {(group["weight_decay"], group["momentum"]) for group in optimizer.param_groups} == {(0.2, 0.75)}


def test_names_of_torch_optim_stay() -> None:
    make, options = optimizer_class(Optimizer(name="SGD", lr=0.1, momentum=0.9))
    assert make is torch.optim.SGD
    assert options == {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "test-momentum", "momentun": 1}, r"optimizer: test-momentum: momentun.*momentum=0\.5"),
        ({"name": "test-momentu"}, "optimizer.name: there is no 'test-momentu'; did you mean test-momentum"),
        ({"name": "zzz"}, "optimizer.name: there is no 'zzz'; torch.optim has: .*; Rankfold has: .*test-momentum"),
    ],
)
def test_wrong_names_and_arguments(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RankfoldError, match=message):
        optimizer_class(Optimizer(**values))


def test_galore_by_its_slug() -> None:
    make, options = optimizer_class(Optimizer(name="galore", lr=0.1, rank=64))
    optimizer = make([{"params": [torch.nn.Parameter(torch.ones(128, 96))]}], **options)
    assert isinstance(optimizer, Subspace)
    assert optimizer.projector == Svd(64)
