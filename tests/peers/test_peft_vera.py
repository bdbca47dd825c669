"""VeRA, numerically as PEFT, with the pair of matrices that PEFT's own seed makes."""

import torch
from peft import VeraConfig
from torch import nn

from rankfold import VeRA
from tests.peers.pairs import pair, same_layout, same_training


def names(layer: nn.Module) -> dict:
    return {
        "lambda_d": (layer.vera_lambda_d["default"], same_layout),
        "lambda_b": (layer.vera_lambda_b["default"], same_layout),
    }


def test_outputs_gradients_and_one_step():
    targets = ["up", "down"]
    config = VeraConfig(r=5, target_modules=targets, projection_prng_key=0, save_projection=True)
    theirs, ours, adapter = pair(config, VeRA(rank=5), targets)
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    torch.testing.assert_close(adapter.shared.A.double(), A, atol=1e-6, rtol=0)
    torch.testing.assert_close(adapter.shared.B.double(), B, atol=1e-6, rtol=0)
    A.copy_(adapter.shared.A)
    B.copy_(adapter.shared.B)
    same_training(theirs, ours, adapter, names)
