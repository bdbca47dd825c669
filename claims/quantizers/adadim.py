"""AdaDim on a model whose activations have outliers, and on the same model without."""

from itertools import islice

import torch

import rankfold
from claims.harness import Expect, Measure, Side, build, run
from claims.quantizers._packed import KL, _divergence, _on_code
from claims.tasks import Loaded
from rankfold.core.packed import PackedLinear

TURNED = "share of layers behind a norm with groups along the outputs"


def side(how: str, along: str = "in", outliers: float = 20.0) -> Side:
    return Side(None, lr=0.0, merge={"how": {"name": how}, "along": along, "outliers": outliers})


def rounded(loaded: Loaded, side: Side, seed: int, measure: Measure | None) -> dict[str, float]:
    """Pack in 3 bits after one channel in a hundred, but at least one, has been made larger behind each norm.

    The columns that read it are made smaller by the same, so that the float model says what it said before.
    """
    assert side.merge is not None
    part, teacher = _on_code()
    part.fresh(seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in part.model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                channel = int(torch.randint(len(norm.weight), (1,), generator=rng))
                norm.weight[channel] *= side.merge["outliers"]
                for layer in readers:
                    layer.weight[:, channel] /= side.merge["outliers"]
    rule = build(side.merge["how"])
    text = list(islice(part.batches(seed), 16)) if rule.span[0] else None
    rankfold.quantize(
        part.model, rankfold.Scheme(format="int3", group=32, along=side.merge["along"]), rule, calibration=text
    )
    read = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    behind = [m for path, m in part.model.named_modules() if path.endswith(read) and isinstance(m, PackedLinear)]
    found = {"held-out loss": part.evaluate()["held-out loss"], KL: _divergence(part.model, teacher)}
    found[TURNED] = sum(layer.scheme.along == "out" for layer in behind) / len(behind)
    return {name: float(f"{value:.6g}") for name, value in found.items()}


run(
    claim="Where an input channel has outliers of activation AdaDim turns the groups along the outputs, more than "
    "where none has, and is no further from the float model than either direction for all layers.",
    source="arXiv 2309.15531",
    task="from code",
    sides={
        "adadim": side("adadim"),
        "along the inputs": side("rtn"),
        "along the outputs": side("rtn", "out"),
        "adadim, no outliers": side("adadim", outliers=1.0),
        "along the inputs, no outliers": side("rtn", outliers=1.0),
    },
    expects=[
        Expect("adadim", "along the inputs", KL),
        Expect("adadim", "along the outputs", KL),
        Expect("along the outputs", "along the inputs", KL),
        Expect("adadim, no outliers", "adadim", TURNED),
        Expect("adadim, no outliers", "along the inputs, no outliers", KL),
    ],
    how=rounded,
    note="3 bits in groups of 32. One channel of 64 behind each norm is 20 times as large, its columns a twentieth.",
)
