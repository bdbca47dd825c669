import pytest
import torch
from torch import nn

import rankfold
from rankfold import BitFit
from tests.methods.support import DOUBLE, attached, close, draw, linear, put


def test_trains_the_biases_there_are_and_no_other():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5, bias=False), nn.Conv1d(3, 5, 2))
    adapter = rankfold.attach(model, BitFit(), targets="biases")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in names} == {"0", "1", "3"}
    assert all(name.endswith("bias") for name in names)
    assert adapter.num_parameters() == 6 + 6 + 5 == adapter.method.num_parameters(adapter.sites)


def test_training_the_change_is_training_the_bias():
    """One step with momentum and weight decay off, against a plain layer."""
    model, delta = attached(linear(draw(5, 4), draw(5)), BitFit())
    plain = linear(draw(5, 4), draw(5))
    x = draw(3, 4, seed=1)
    for trained, parameter in ((model, delta.bias), (plain, plain.bias)):
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        trained(x).square().sum().backward()
        optimizer.step()
    close(model(x), plain(x).detach())
    rankfold.merge(model)
    close(model[0].bias, plain.bias.detach())


def test_a_layer_norm_and_a_convolution():
    for layer, x in ((nn.LayerNorm(6), draw(2, 6)), (nn.Conv2d(3, 6, 2), draw(2, 3, 4, 4))):
        layer = layer.to(DOUBLE)
        before = layer(x)
        model, delta = attached(layer, BitFit())
        put(delta, bias=torch.arange(6))
        step = torch.arange(6, dtype=DOUBLE)
        close(model(x), (before + (step if x.dim() == 2 else step.view(6, 1, 1))).detach())
        rankfold.merge(model)
        close(model(x), (before + (step if x.dim() == 2 else step.view(6, 1, 1))).detach())


def test_a_layer_norm_over_two_dimensions():
    model, delta = attached(nn.LayerNorm((2, 3), dtype=DOUBLE), BitFit())
    x = draw(4, 2, 3)
    before = model(x).detach()
    put(delta, bias=torch.arange(6))
    close(model(x), before + torch.arange(6).view(2, 3))
    rankfold.merge(model)
    close(model(x), before + torch.arange(6).view(2, 3))


def test_a_layer_without_a_bias_is_refused():
    with pytest.raises(rankfold.UnsupportedError, match="no bias"):
        attached(nn.Linear(3, 3, bias=False), BitFit())
