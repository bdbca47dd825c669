"""Reading the dense weight out of a layer whose weight is stored in few bits (bitsandbytes, torchao)."""

import torch
from torch import Tensor, nn

from rankfold.errors import UnsupportedError


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary floating-point tensor that `F.linear` may be fused over."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def dense(weight: Tensor) -> Tensor:
    """The weight as an ordinary floating-point tensor: itself if it is one, dequantised if it is not."""
    if is_plain(weight):
        return weight
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes 4-bit
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:  # bitsandbytes int8: rows scaled by their largest magnitude
        return weight.data.to(torch.float32) * (weight.SCB.to(torch.float32) / 127).unsqueeze(-1)
    if type(weight) not in (Tensor, nn.Parameter):  # torchao and other tensor subclasses
        return weight.dequantize()
    raise UnsupportedError(
        f"the weight holds {weight.dtype} numbers in no layout Rankfold can read; supported are float weights, "
        "bitsandbytes 4-bit (after the model was moved to its device once, which quantises it) and int8, and torchao"
    )
