import pytest
import torch
from torch import nn

import rankfold
from rankfold import IA3
from rankfold.core import Site
from tests.methods.support import DOUBLE, attached, close, draw, linear, perturb, put


def test_output_gain_scales_weight_and_bias():
    model, delta = attached(linear([[1, 2], [3, 4]], [5, 6]), IA3())
    put(delta, l=[2, 3])
    close(delta.transform(delta.W), [[2, 4], [9, 12]])
    close(delta.b + delta.bias_update(delta.b), [10, 18])
    close(model(torch.tensor([[1.0, 1.0]], dtype=DOUBLE)), [[16, 39]])


def test_input_gain_scales_columns_and_not_the_bias():
    model, delta = attached(linear([[1, 2], [3, 4]], [5, 6]), IA3(feedforward=["0"]))
    put(delta, l=[2, 3])
    close(delta.transform(delta.W), [[2, 6], [6, 12]])
    assert delta.bias_update(delta.b) is None
    close(model(torch.tensor([[1.0, 1.0]], dtype=DOUBLE)), [[13, 24]])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("feedforward", [[], ["0"]])
def test_a_convolution_has_a_gain_for_each_channel(groups: int, feedforward: list[str]):
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=groups, dtype=DOUBLE)
    method = IA3(feedforward=feedforward)
    model, delta = attached(layer, method)
    assert delta.l.numel() == method.count(delta.site) == (4 if feedforward else 8)
    perturb(delta)
    x = draw(2, 4, 5, 5)
    y = model(x)
    scaled = layer._conv_forward(x * delta.l.view(-1, 1, 1), layer.weight, layer.bias) if feedforward else None
    plain = layer._conv_forward(x, layer.weight, layer.bias) * delta.l.view(-1, 1, 1) if not feedforward else scaled
    close(y, plain.detach())
    rankfold.merge(model)
    close(model(x), y.detach())


@pytest.mark.parametrize(
    ("path", "on_input"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.experts.down_proj", True),
        ("model.decoder.layers.0.fc2", True),
        ("encoder.block.0.layer.1.DenseReluDense.wo", True),
        ("encoder.layer.3.output.dense", True),
        ("transformer.h.0.mlp.c_proj", True),
        ("transformer.layer.0.ffn.lin2", True),
        ("encoder.layer.3.attention.output.dense", False),
        ("transformer.h.0.attn.c_proj", False),
        ("layers.0.attention.wo", False),
        ("model.layers.0.self_attn.k_proj", False),
        ("model.layers.0.mlp.up_proj", False),
        ("encoder.layer.3.intermediate.dense", False),
    ],
)
def test_which_layers_get_the_gain_on_their_input(path: str, on_input: bool):
    assert IA3().on_input(Site(path, "linear", (4, 4), True, DOUBLE)) is on_input


def test_feedforward_as_list_and_as_expression():
    site = Site("a.up_proj", "linear", (4, 4), True, DOUBLE)
    assert IA3(feedforward=["up_proj"]).on_input(site)
    assert not IA3(feedforward=["p_proj"]).on_input(site)
    assert IA3(feedforward=r".*p_proj").on_input(site)
    assert not IA3(feedforward="up_proj").on_input(site)


def test_starts_at_one_counts_and_refuses_ids():
    _, delta = attached(nn.Linear(5, 7), IA3())
    assert (delta.l == 1).all()
    assert delta.l.numel() == IA3().count(delta.site) == 7
    with pytest.raises(rankfold.UnsupportedError, match="ids"):
        attached(nn.Embedding(5, 7), IA3(feedforward=["0"]))
