"""The files of GPTQ's tools: AutoGPTQ and GPTQModel write them, vLLM and Transformers read them too.

Of a layer with codes q of b bits, scales s and zeros z, groups of g inputs, they hold

    qweight  int32 (in b / 32, out)      codes of an output, a stream of bits along its inputs, the first lowest
    qzeros   int32 (groups, out b / 32)  z − 1 ("gptq") or z ("gptq_v2"), a stream along the outputs
    scales   (groups, out)
    g_idx    int32 (in,)                 the group of each input: i // g, or in act_order ("desc_act") any

and stand for `ŵ_oi = s (q − z)` with the s and z of group g_idx_i. Bytes of codes are those of a packed layer, turned.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.packed import Packed, PackedLinear, Scheme, pack, unpack
from rankfold.errors import RankfoldError, UnsupportedError

_FORMATS: dict[int, Any] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}


def tensors(layer: PackedLinear, v2: bool) -> dict[str, Tensor]:
    """What the file holds of the layer."""
    scheme, n, packed = layer.scheme, layer.in_features, layer.packed
    codes, order = packed.codes, packed.order
    g_idx = torch.arange(n, dtype=torch.int32, device=codes.device) // _size(scheme, n)
    if order is not None:
        codes = pack(unpack(codes, n, scheme)[:, order.argsort()], scheme)
        g_idx = g_idx[order.argsort()]
    zeros = packed.zeros
    if zeros is None:
        zeros = torch.full_like(packed.scales, scheme.offset, dtype=torch.uint8)
    stored = pack(zeros.mT if v2 else zeros.mT - 1, scheme)
    held = {
        "qweight": codes.clone().view(torch.int32).mT.contiguous(),
        "qzeros": stored.view(torch.int32),
        "scales": packed.scales.detach().mT.contiguous(),
        "g_idx": g_idx,
    }
    return held if layer.bias is None else {**held, "bias": layer.bias.detach()}


def configuration(layers: dict[str, PackedLinear], left: Iterable[str], version: str) -> dict[str, Any]:
    """`quantization_config` of a model with these layers; `left` are its other linear ones.

    Raises UnsupportedError where the format has no place for a layer.
    """
    for path, layer in layers.items():
        _check(path, layer)
    first = next(iter(layers.values())).scheme
    if any(_told(layer.scheme) != _told(first) for layer in layers.values()):
        raise UnsupportedError("GPTQ's files have one width, group and symmetry for all layers: pack them alike")
    lowest = min((int(layer.zeros.min()) for layer in layers.values() if layer.zeros is not None), default=1)
    form = "gptq" if lowest > 0 else "gptq_v2"  # z − 1 has no place for a z of 0
    return {
        "quant_method": "gptq",
        "bits": first.levels.bit_length() - 1,
        "group_size": first.group if isinstance(first.group, int) else -1,
        "desc_act": first.ordered,
        "sym": first.symmetric,
        "lm_head": "lm_head" in layers,
        "checkpoint_format": form,
        "format": form,
        "dynamic": {rf"-:^{re.escape(path)}$": {} for path in left},
        "meta": {"quantizer": [f"rankfold:{version}"]},
    }


def _told(scheme: Scheme) -> Any:
    return scheme.format, scheme.group, scheme.symmetric, scheme.ordered


def _size(scheme: Scheme, n: int) -> int:
    return scheme.group if isinstance(scheme.group, int) else n


def _check(path: str, layer: PackedLinear) -> None:
    scheme, bits = layer.scheme, layer.scheme.levels.bit_length() - 1
    if scheme.format not in _FORMATS.values() or scheme.along != "in" or scheme.group == "tensor":
        what = f"{scheme.format} with groups of {scheme.group} along={scheme.along!r}"
        raise UnsupportedError(
            f"GPTQ's files hold int8, int4, int3 and int2 in groups along the inputs; {path} is {what}"
        )
    plain = scheme.symmetric or scheme.zeros == "uint8"
    if scheme.activations is not None or scheme.balanced or not plain:
        raise UnsupportedError(f"GPTQ's files have codes, scales and whole zeros, nothing else; {path} is {scheme}")
    if layer.in_features * bits % 32 or layer.out_features * bits % 32:
        shape = f"{layer.out_features} x {layer.in_features}"
        raise UnsupportedError(
            f"GPTQ's files pack whole words of 32 bits; {path} is {shape} in {bits} bits: leave it out"
        )


class GPTQTensors(nn.Module):
    """A layer as the file holds it, until its tensors are read."""

    def __init__(self, old: nn.Linear, shapes: dict[str, tuple[int, ...]], scales: torch.dtype, group: int):
        super().__init__()
        self.old, self.group = [old], group  # in a list, so that it is none of its children
        n, rows = old.in_features, old.out_features
        words = shapes["qweight"][0]
        self.bits = words * 32 // n
        groups = -(-n // group)
        right = {"qweight": (n * self.bits // 32, rows), "qzeros": (groups, rows * self.bits // 32)}
        right |= {"scales": (groups, rows), "g_idx": (n,)}
        if self.bits not in _FORMATS or words * 32 % n or any(shapes[name] != right[name] for name in shapes):
            raise RankfoldError(f"tensors {shapes} are none of GPTQ's files for {rows} x {n} in groups of {group}")
        for name, shape in right.items():
            dtype = scales if name == "scales" else torch.int32
            present = name in shapes
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta") if present else None)
        self.bias = old.bias

    def packed(self, v2: bool) -> PackedLinear:
        """The packed layer of what was read. Raises RankfoldError where that fits together in no way."""
        held: Any = self
        old = self.old[0]
        n, rows = old.in_features, old.out_features
        words = Scheme(format=_FORMATS[self.bits])
        zeros = unpack(held.qzeros.view(torch.uint8), rows, words).mT.contiguous()
        if not v2:
            if self.bits == 8 and bool((zeros == 255).any()):
                raise RankfoldError("a zero point of 256, which no byte holds: the file's zeros are damaged")
            zeros = zeros + 1
        codes, order = held.qweight.mT.contiguous().view(torch.uint8), None
        even = torch.arange(n, dtype=torch.int32) // self.group
        if held.g_idx is not None and not torch.equal(held.g_idx.cpu(), even):
            order = held.g_idx.argsort(stable=True).int()
            if not torch.equal(held.g_idx[order].cpu(), even):
                raise RankfoldError(f"g_idx names no groups of {self.group} inputs")
            codes = pack(unpack(codes, n, words)[:, order], words)
        symmetric = bool((zeros == words.offset).all())
        scales: Any = str(held.scales.dtype).removeprefix("torch.")
        group: Any = self.group if self.group < n else "channel"
        scheme = Scheme(format=words.format, group=group, symmetric=symmetric, scales=scales, ordered=order is not None)
        old.bias = self.bias
        found = Packed(codes, held.scales.mT.contiguous(), None if symmetric else zeros, order)
        return PackedLinear.of(old, found, scheme)
