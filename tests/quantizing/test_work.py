"""A quantisation that is stopped and started again comes to the same, and does nothing twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankfold
from rankfold.core.codebooks import Codebooks
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.errors import RankfoldError
from rankfold.quantizers import _distil
from rankfold.quantizers.gptq import GPTQ
from rankfold.quantizers.pv_tuning import PVTuning
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


TRAINED = {
    "lrec": {"how": "rtn", "compensate": rankfold.build("lrec", rank=2, epochs=3), "targets": ["up", "down"]},
    "pv-tuning": {
        "scheme": Codebooks(books=1, bits=2, width=2),
        "how": PVTuning(epochs=3, rho=0.1, tau=0.1),
        "compensate": None,
        "targets": ["up", "down"],
    },
}


@pytest.mark.parametrize("slug", list(TRAINED))
def test_training_over_all_layers_goes_on_after_the_steps_that_were_kept(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_distil, "PATIENCE", 0.0)
    told: list[tuple[int, int]] = []
    expected = state(quantised(None, **TRAINED[slug], trained=lambda *steps: told.append(steps)))
    total = told[-1][1]
    assert told == [(n + 1, total) for n in range(total)]
    assert total >= 5

    def stop(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantised(tmp_path, **TRAINED[slug], trained=stop)
    told.clear()
    starts: list[int] = []
    plain = PVTuning.start
    monkeypatch.setattr(PVTuning, "start", lambda *args: starts.append(1) or plain(*args))
    found = state(quantised(tmp_path, **TRAINED[slug], trained=lambda *steps: told.append(steps)))
    assert told[0][0] in (2, 3, 4, 5), "kept more seldom only where writing takes over a twentieth of the time"
    assert told[-1] == (total, total)
    assert not starts
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    told.clear()
    again = state(quantised(tmp_path, **TRAINED[slug], trained=lambda *steps: told.append(steps)))
    assert not told
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    cut = load_file(tmp_path / "training.safetensors")
    with safe_open(tmp_path / "training.safetensors", "pt") as file:
        metadata = file.metadata()
    cut.pop(next(key for key in sorted(cut) if "exp_avg" not in key and "step" not in key))
    save_file(cut, tmp_path / "training.safetensors", metadata)
    with pytest.raises(RankfoldError, match=r"training\.safetensors is damaged"):
        quantised(tmp_path, **TRAINED[slug])


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
