"""The starts of CorDA and LoftQ, as PEFT computes them from the same weights and the same data."""

import dataclasses
import importlib.util
import sys
import types
import warnings

import pytest
import torch
from torch import nn

import rankfold
from rankfold.core.calibration import SampleCovariance, calibrate
from rankfold.inits.corda import CorDA
from rankfold.inits.loftq import LoftQ
from tests.quantizers import linear_4bit

SAMPLES = [torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


@pytest.fixture
def _attrs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes `dataclass` from the package attrs here, which it does not install."""
    if importlib.util.find_spec("attr") is None:
        stand_in = types.ModuleType("attr")
        stand_in.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "attr", stand_in)


@pytest.mark.usefixtures("_attrs")
@pytest.mark.parametrize(("mode", "theirs"), [("knowledge", "kpm"), ("instruction", "ipm")])
@pytest.mark.parametrize("alpha", [4, 10])
def test_corda(mode: str, theirs: str, alpha: int) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    corda = CordaConfig(corda_method=theirs, prune_temporary_fields=False)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights="corda", corda_config=corda)
    peer = net()
    preprocess_corda(peer, config, run_model=lambda: [peer(x) for x in SAMPLES])
    covariances = {name: peer.get_submodule(name).covariance_matrix for name in ("0", "2")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = get_peft_model(peer, config)

    model = net()
    found = calibrate(model, SAMPLES, [SampleCovariance()])
    method = rankfold.LoRA(rank=4, alpha=alpha)
    adapter = rankfold.attach(model, method, ["0", "2"], init=CorDA(mode=mode), calibration=SAMPLES)
    for name, delta in adapter.deltas.items():
        torch.testing.assert_close(found.get(SampleCovariance(), name), covariances[name], atol=1e-5, rtol=1e-5)
        layer = peer.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sign = (delta.A * A).sum(1).sign()
        torch.testing.assert_close(delta.A.detach(), sign.unsqueeze(1) * A.detach(), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(delta.B.detach(), sign * B.detach(), atol=2e-4, rtol=1e-3)
        residual = delta.W - delta.scale * delta.B0 @ delta.A0
        torch.testing.assert_close(residual.detach(), layer.base_layer.weight.detach(), atol=1e-4, rtol=1e-3)


def test_loftq(tmp_path) -> None:
    """PEFT moves the weight to a GPU first, so this goes by the two functions that do the work there."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.utils.loftq_utils import _low_rank_decomposition
    from safetensors.torch import save_file

    torch.manual_seed(0)
    whole = nn.Linear(64, 48)
    save_file({"0.weight": whole.weight.detach()}, tmp_path / "model.safetensors")
    base = nn.Sequential(linear_4bit(whole))
    Q = dequantize_4bit(base[0].weight.data, base[0].weight.quant_state)
    theirs = _low_rank_decomposition(whole.weight.detach() - Q, reduced_rank=8)
    adapter = rankfold.attach(base, rankfold.LoRA(rank=8), ["0"], init=LoftQ(reference=str(tmp_path)))
    delta = adapter.deltas["0"]
    sign = (delta.A * theirs["R"]).sum(1).sign()
    torch.testing.assert_close(delta.A.detach(), sign.unsqueeze(1) * theirs["R"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta.B.detach(), sign * theirs["L"], atol=1e-5, rtol=1e-4)
