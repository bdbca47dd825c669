"""Experts of a Transformers model: where they are, and the file that holds them packed, each in its own bit width."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from rankfold.core.files import open_inside, write_whole
from rankfold.core.layers import Adapted
from rankfold.core.packed import Packed, Scheme
from rankfold.core.routing import unwrapped
from rankfold.core.tensorfile import TensorFile, TensorWriter
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError
from rankfold.quantizers.rtn import RTN

Expert = tuple[int, int]  # which layer of experts, in the order that they run, and which of its experts
FILE = "experts.safetensors"


class ExpertLayer(BaseModel):
    """A layer of experts as its file describes it: matrices (out, in) by name, and how each expert is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    fused: bool
    dtype: str = Field(pattern="float32|float16|bfloat16")
    shapes: dict[str, tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]]
    schemes: list[Scheme]

    def bytes(self, expert: int) -> int:
        """What an expert takes on disk and in memory."""
        return packed_bytes(self.shapes.values(), self.schemes[expert])


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a Transformers model that hold experts, by path in the order that they run: fused ones, whose
    weights are 3-D parameters, or dictionaries of feed-forward modules (Switch, NLLB).

    Raises UnsupportedError where there are none.
    """
    found = {path: m for path, m in unwrapped(model).named_modules() if _is_fused(m) or _is_dictionary(m)}
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no layers of experts that could be paged")
    for path, module in found.items():
        if isinstance(module, Adapted):
            raise RankfoldError(f"{path} is adapted: page the experts of the base model, and adapt other layers then")
    return found


def matrices(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """An expert's weights W (out, in)."""
    if _is_fused(module):
        weights = {name: module._parameters[name][expert] for name in weight_names(module)}  # type: ignore[index]
        return {name: W.mT if module.is_transposed else W for name, W in weights.items()}
    return {f"{path}.weight": linear.weight for path, linear in linears_of(module, expert).items()}


def count(module: nn.Module) -> int:
    """How many experts a layer has."""
    return len(module) if isinstance(module, nn.ModuleDict) else int(module.num_experts)  # type: ignore[arg-type]


def _is_fused(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and any(p.dim() == 3 for p in module._parameters.values() if p is not None)


def _is_dictionary(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) and hasattr(module, "num_experts") and "expert_0" in module


def linears_of(module: Any, expert: int) -> dict[str, nn.Linear]:
    return {path: m for path, m in module[f"expert_{expert}"].named_modules() if isinstance(m, nn.Linear)}


def weight_names(module: nn.Module) -> list[str]:
    """The names, within a layer, of the tensors that hold its experts' weights."""
    if _is_fused(module):
        return [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    return [f"expert_{e}.{name}" for e in range(count(module)) for name in matrices(module, e)]


def let_go(module: Any) -> None:
    """Free the weights of a layer's experts; something empty stands in their places."""
    nothing = torch.empty(0, device="cpu")
    if _is_fused(module):
        for name in weight_names(module):
            del module._parameters[name]
            setattr(module, name, nothing)
    elif _is_dictionary(module):
        for expert in range(len(module)):
            for linear in linears_of(module, expert).values():
                linear._parameters.pop("weight", None)
                linear.__dict__["weight"] = nothing


# ---- on disk


@torch.no_grad()
def pack_experts(
    model: nn.Module, file: str | Path, widths: Mapping[Expert, int] | int = 4, scheme: Scheme | None = None
) -> Path:
    """Write a model's experts, rounded to nearest; a file of safetensors in which each expert lies in one piece.

    Args:
        model: with its experts' weights, unadapted.
        file: replaced whole.
        widths: bits of each expert, or of all: 8, 4, 3 or 2.
        scheme: how codes are grouped and scales kept; its format is the widths'.
    """
    file, layers = Path(file), []
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = TensorWriter(file.parent)
    try:
        for number, (path, module) in enumerate(expert_layers(model).items()):
            first, schemes = matrices(module, 0), []
            for expert in range(count(module)):
                own = at_width(widths if isinstance(widths, int) else widths[number, expert], scheme)
                schemes.append(own)
                for name, W in matrices(module, expert).items():
                    packed = RTN().quantise(W.float(), own, None, path)
                    for part in _parts(own):
                        writer.add(f"{number}.{expert}.{name}.{part}", getattr(packed, part))
            layers.append(
                ExpertLayer(
                    path=path,
                    fused=_is_fused(module),
                    dtype=str(next(iter(first.values())).dtype).removeprefix("torch."),
                    shapes={name: tuple(W.shape) for name, W in first.items()},  # type: ignore[misc]
                    schemes=schemes,
                )
            )
        described = json.dumps([layer.model_dump() for layer in layers])
        return write_whole(file, lambda place: writer.write(place, {"experts": described}))
    finally:
        writer.close()


def at_width(bits: int, scheme: Scheme | None = None) -> Scheme:
    """The scheme with codes of so many bits."""
    return _rounded(Scheme.model_validate({**(scheme or Scheme()).model_dump(), "format": f"int{bits}"}))


def _rounded(scheme: Scheme) -> Scheme:
    if scheme.double or scheme.ordered or scheme.balanced or scheme.activations is not None:
        raise UnsupportedError(f"experts are rounded to nearest, without what {scheme} keeps beside scales and zeros")
    return scheme


def packed_bytes(shapes: Iterable[tuple[int, ...]], scheme: Scheme) -> int:
    """What matrices of these shapes take."""
    return sum(round(scheme.bits(out, in_) * out * in_ / 8) for out, in_ in shapes)


def _parts(scheme: Scheme) -> tuple[str, ...]:
    return ("codes", "scales") if scheme.symmetric else ("codes", "scales", "zeros")


class ExpertFile:
    """The checked header of a file of experts, and its experts one at a time: read in one thread only."""

    def __init__(self, file: str | Path):
        self.what = str(file)
        try:
            self._handle: BinaryIO = open_inside(Path(file).parent, Path(file).name)
        except FileNotFoundError:
            raise AdapterFileError(f"there is no file {file}: rankfold.serve.experts.pack_experts writes it") from None
        try:
            self._file = TensorFile(self._handle, self.what)
            self.layers = [ExpertLayer.model_validate(one) for one in json.loads(self._file.metadata["experts"])]
            self._check()
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            self.close()
            if isinstance(error, RankfoldError):
                raise
            raise AdapterFileError(f"{self.what} does not describe experts: {error}") from None

    def _check(self) -> None:
        """Every tensor that the description needs is there, in its shape and dtype, and none more."""
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for number, layer in enumerate(self.layers):
            for expert, scheme in enumerate(layer.schemes):
                for name, shape in layer.shapes.items():
                    rows, _, groups, size = _rounded(scheme).layout(*shape)
                    per = (1 if scheme.group == "tensor" else rows, groups)
                    at = f"{number}.{expert}.{name}"
                    expected[f"{at}.codes"] = (rows, size), torch.uint8
                    expected[f"{at}.scales"] = per, getattr(torch, scheme.scales)
                    if not scheme.symmetric:
                        expected[f"{at}.zeros"] = per, getattr(torch, scheme.zeros)
        there = {name: (entry.shape, entry.dtype) for name, entry in self._file.entries.items()}
        if there != expected:
            wrong = sorted({name for name in there.keys() | expected.keys() if there.get(name) != expected.get(name)})
            raise AdapterFileError(f"{self.what} is damaged: {wrong[0]!r} is not what its description says")

    def read(self, key: Expert, device: torch.device | str = "cpu") -> dict[str, Packed]:
        """An expert's packed matrices, read from the disk."""
        layer, at, scheme = self.layers[key[0]], f"{key[0]}.{key[1]}", self.layers[key[0]].schemes[key[1]]
        parts = {name: {part: f"{at}.{name}.{part}" for part in _parts(scheme)} for name in layer.shapes}
        tensors = self._file.some(self._handle, [where for one in parts.values() for where in one.values()])

        def packed(one: dict[str, str]) -> Packed:
            own: dict[str, Any] = {part: tensors[where].to(device) for part, where in one.items()}
            return Packed(**{"zeros": None, **own})

        return {name: packed(one) for name, one in parts.items()}

    def close(self) -> None:
        self._handle.close()
