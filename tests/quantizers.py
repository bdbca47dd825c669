"""The quantisers that work on a CPU: `QUANTIZERS[name](model)` quantises every `nn.Linear` of a small model in place.

Inputs must be a multiple of 32 wide for `torchao-int4` (its group size) and weights hold a multiple of 64 numbers for
`torchao-nf4`; the others take any size. Left out, because torch 2.13 with torchao 0.18 cannot train over them on a CPU:
torchao's `Int4WeightOnlyConfig` in all its packings (plain and preshuffled need the GPU package mslk, plain_int32 an
XPU, tile_packed_to_4d CUDA) and its prototype for CPUs (no backward).
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from rankfold.core.packed import Format, Scheme
from rankfold.quantizers._quantizer import quantize

Quantizer = Callable[[nn.Module], nn.Module]


def each_linear(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace every plain linear layer by `change(layer)`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_linear(child):
                setattr(module, name, change(child))
    return model


def linear_4bit(layer: nn.Linear, kind: str = "nf4", double: bool = False, move: bool = True) -> nn.Module:
    """The layer as bitsandbytes' `Linear4bit`; unquantised still with `move=False`."""
    from bitsandbytes.nn import Linear4bit

    new = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compress_statistics=double, quant_type=kind
    ).to(layer.weight.dtype)
    new.load_state_dict(layer.state_dict())
    new.train(layer.training)
    return new.to(layer.weight.device) if move else new


def linear_8bit(layer: nn.Linear, move: bool = True) -> nn.Module:
    """The layer as bitsandbytes' `Linear8bitLt` (LLM.int8 without outliers); unquantised still with `move=False`."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # It says for every float32 input that it rounds to float16 in between.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    new = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    new.weight = Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    new.train(layer.training)
    return new.to(layer.weight.device) if move else new


def _torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=_is_linear)
    return model


def _torchao_int4(model: nn.Module) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), filter_fn=_is_linear)
    return model


def _torchao_nf4(model: nn.Module) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    for module in model.modules():
        if _is_linear(module):
            blocks = module.weight.numel() // 64
            weight = to_nf4(module.weight.detach(), 64, math.gcd(blocks, 256))
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _is_linear(module: nn.Module, name: str = "") -> bool:
    return type(module) is nn.Linear


def _packed(model: nn.Module, format: Format) -> nn.Module:
    quantize(model, Scheme(format=format, group=32), targets=lambda name, module: _is_linear(module))
    return model


QUANTIZERS: dict[str, Quantizer] = {
    "rankfold-int4": lambda model: _packed(model, "int4"),
    "rankfold-nf4": lambda model: _packed(model, "nf4"),
    "bitsandbytes-nf4": lambda model: each_linear(model, lambda layer: linear_4bit(layer, "nf4")),
    "bitsandbytes-nf4-double": lambda model: each_linear(model, lambda layer: linear_4bit(layer, "nf4", double=True)),
    "bitsandbytes-fp4": lambda model: each_linear(model, lambda layer: linear_4bit(layer, "fp4")),
    "bitsandbytes-fp4-double": lambda model: each_linear(model, lambda layer: linear_4bit(layer, "fp4", double=True)),
    "bitsandbytes-int8": lambda model: each_linear(model, linear_8bit),
    "torchao-int8": _torchao_int8,
    "torchao-int4": _torchao_int4,
    "torchao-nf4": _torchao_nf4,
}
