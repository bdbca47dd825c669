"""A quantisation that is stopped and started again comes to the same, and does nothing twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rankfold
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.errors import RankfoldError
from rankfold.quantizers.gptq import GPTQ
from tests.quantizing.test_compensation import Stack, stack

SCHEME = Scheme(format="int3", group=8)


def quantised(work: Path | None, stop_after: int = 99, **options: Any) -> Stack:
    model, batches = stack()
    done: list[str] = []

    def count(path: str) -> None:
        done.append(path)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    asked = {"scheme": SCHEME, "how": "gptq", "compensate": rankfold.EoRA(rank=2), "calibration": batches, **options}
    rankfold.quantize(model, **asked, progress=count, work=work)
    return model


def state(model: Stack) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_comes_to_the_same_and_finished_blocks_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state(quantised(None))
    with pytest.raises(KeyboardInterrupt):
        quantised(tmp_path / "work", stop_after=5)  # of 8 layers: first and last, then two a block
    assert len(list((tmp_path / "work").iterdir())) == 2
    rounds: list[int] = []
    plain = GPTQ.rounded
    monkeypatch.setattr(GPTQ, "rounded", lambda *args: rounds.append(1) or plain(*args))
    found = state(quantised(tmp_path / "work"))
    assert len(rounds) == 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    rounds.clear()
    assert all(torch.equal(tensor, found[name]) for name, tensor in state(quantised(tmp_path / "work")).items())
    assert not rounds


def test_every_kind_of_packed_weight_is_kept(tmp_path: Path) -> None:
    for i, options in enumerate(
        (
            {"how": "rtn", "calibration": None, "compensate": None, "scheme": Scheme(double=True)},
            {"how": "awq", "compensate": None},
            {"how": "adadim", "scheme": SCHEME.model_copy(update={"symmetric": True})},
        )
    ):
        one, again = quantised(tmp_path / str(i), **options), quantised(tmp_path / str(i), **options)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in one.state_dict().items())
        for path, layer in one.named_modules():
            if isinstance(layer, PackedLinear):
                assert again.get_submodule(path).scheme == layer.scheme


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": SCHEME.model_copy(update={"format": "int4"})},
        {"how": rankfold.build("gptq", damping=0.1)},
        {"compensate": rankfold.EoRA(rank=3)},
        {"calibration": [torch.ones(4, 8)]},
        {"targets": ["up"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_done_with_other_arguments_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    quantised(tmp_path)
    with pytest.raises(RankfoldError, match="of another model or with other arguments"):
        quantised(tmp_path, **change)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, _ = stack()
    rankfold.quantize(model, SCHEME, work=tmp_path)
    model, _ = stack()
    with torch.no_grad():
        model.first.weight.mul_(1.01)
    with pytest.raises(RankfoldError, match="of another model"):
        rankfold.quantize(model, SCHEME, work=tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("keep", [0, 40, 400])
def test_a_damaged_file_is_named(keep: int, tmp_path: Path) -> None:
    quantised(tmp_path)
    path = sorted(tmp_path.iterdir())[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RankfoldError, match=f"{path.name} is damaged"):
        quantised(tmp_path)
