"""Reading the dense weight out of a layer whose weight is stored in few bits (ours, bitsandbytes, torchao)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.codebooks import CodebookLinear
from rankfold.core.packed import PackedLinear
from rankfold.errors import UnsupportedError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BITSANDBYTES = ("Params4bit", "Int8Params")
_REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes asks this of its layers
_NOT_YET = (
    "the bitsandbytes weight is not quantised yet, which happens when the layer is moved to its device: call "
    'model.to(device) first (also for "cpu")'
)


def is_plain(weight: Tensor) -> bool:
    """Whether `F.linear` may be fused over the weight: a tensor of ordinary floats (float8 has a scale)."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in _FLOATS


def base_of(weight: Tensor, layer: Any) -> str:
    """How the layer keeps the weight: "float", "packed" (a `PackedLinear`), or "foreign", as another library has it."""
    if isinstance(layer, PackedLinear):
        return "packed"
    return "float" if is_plain(weight) else "foreign"


def dense(weight: Tensor, layer: Any = None) -> Tensor:
    """The weight as an ordinary floating-point tensor: itself if it is one, else as its own library dequantises it.

    `layer` is the module that holds the weight. bitsandbytes keeps the scales of an int8 weight there from the first
    forward on, and those of a 4-bit weight that FSDP took apart.
    """
    if is_plain(weight):
        return weight
    if isinstance(layer, PackedLinear | CodebookLinear):
        return layer.dequantise()
    if hasattr(weight, "full_tensor"):  # sharded by FSDP: every process has to take part
        return dense(weight.full_tensor(), layer)  # type: ignore[attr-defined]
    if (state := _state_4bit(weight, layer)) is not None:
        from bitsandbytes import functional

        data = weight.data
        if _is_packed(state):
            data, state = _unpacked(data, copy.copy(state))
        return functional.dequantize_4bit(data, state)
    if weight.dtype == torch.int8 and (scales := _scales_int8(weight, layer)) is not None:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, scales)
    if type(weight).__name__ in _BITSANDBYTES:
        if getattr(weight, "has_fp16_weights", False):  # rounded anew in each forward
            return weight.data
        raise UnsupportedError(_NOT_YET)
    if type(weight) not in (Tensor, nn.Parameter):  # torchao and other tensor subclasses; its NF4 has a word of its own
        try:
            return getattr(weight, "get_original_weight", weight.dequantize)()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise UnsupportedError(
                f"{type(weight).__name__} has no way back to floating-point numbers ({str(error)[:80]}...): only a "
                "change that never reads the base weight, such as LoRA's, can sit on this layer"
            ) from error
    raise UnsupportedError(
        f"the weight holds {weight.dtype} numbers in no layout Rankfold can read; supported are float weights, "
        "rankfold.quantize, bitsandbytes 4-bit and int8, and torchao"
    )


def prepare(layer: Any, name: str) -> None:
    """Before a layer is adapted: refuse a bitsandbytes weight that is not quantised yet."""
    weight = layer._parameters.get("weight")
    if type(weight).__name__ not in _BITSANDBYTES:
        return
    state = _state_4bit(weight, layer)
    quantised = state is not None or weight.dtype == torch.int8 or getattr(weight, "has_fp16_weights", False)
    if not quantised:
        raise UnsupportedError(f"{name}: {_NOT_YET}")


def without_repacking(model: nn.Module) -> list[nn.Module]:
    """Turn back what bitsandbytes repacked for inference, and keep it from doing so; the layers, for `repack_again`.

    On CPUs with AVX512-BF16 it repacks 4-bit weights in the first forward in eval mode, rounds their scales while at
    it, refuses sizes that are no multiple of 32, and has no gradient through that layout: a layer that is not adapted
    itself but lies behind an adapted one would stop the training that follows an evaluation.
    """
    layers = [module for module in model.modules() if module.__dict__.get(_REPACKS)]
    for layer in layers:
        layer.__dict__[_REPACKS] = False
        weight: Any = layer._parameters["weight"]
        if _is_packed(state := _state_4bit(weight, layer)):
            weight.data, weight.quant_state = _unpacked(weight.data, state)
    return layers


def repack_again(layers: list[nn.Module]) -> None:
    """Let bitsandbytes repack these layers again, as `without_repacking` found them."""
    for layer in layers:
        layer.__dict__[_REPACKS] = True


def _state_4bit(weight: Tensor, layer: Any) -> Any:
    state = getattr(weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _scales_int8(weight: Tensor, layer: Any) -> Tensor | None:
    """The largest magnitude of each row."""
    scales = getattr(weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales


def _is_packed(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    from bitsandbytes import functional

    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    if state.absmax.dim() == 2:  # bitsandbytes 0.50 turns back the scales of double quantisation only
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state
