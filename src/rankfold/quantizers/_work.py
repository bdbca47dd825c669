"""What of a quantisation is done, in a folder: started again with the same arguments it goes on from there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rankfold
from rankfold.core.calibration.blocks import Window
from rankfold.core.files import write_whole
from rankfold.core.fingerprint import about, values
from rankfold.core.packed import Packed, Scheme
from rankfold.errors import RankfoldError


class Done(NamedTuple):
    """A layer that is done: its weight, the scheme it is kept in, and the pair (B, A) that compensates, if any.

    `error` is `‖W − Ŵ‖ / ‖W‖`, `left` the same with the compensation.
    """

    path: str
    packed: Packed
    scheme: Scheme
    pair: tuple[Tensor, Tensor] | None
    error: float
    left: float | None


class Work:
    """A file for each window that is done: its packed layers, with what was said of them and what they carry on.

    Beside them, by name, what training over all layers has come to. Every file holds a fingerprint of the arguments: of
    the model's weights a sample, of the data all.
    """

    def __init__(self, folder: str | Path, model: nn.Module, layers: Mapping[str, Any], *arguments: Any):
        self.folder = Path(folder)
        weights = [[path, str(layer.weight.dtype), values(layer.weight.detach())] for path, layer in layers.items()]
        told = json.dumps([rankfold.__version__, about(model), weights, [_plain(one) for one in arguments]])
        self.asked = hashlib.sha256(told.encode()).hexdigest()

    def read(self, number: int, window: Window) -> list[Done] | None:
        """The layers of the window of that number; None if it is not done."""
        name = f"{number:04}"
        if (found := self._read(name)) is None:
            return None
        tensors, layers = found
        try:
            done = []
            for layer, scheme, error, left in json.loads(layers):
                kept = {name: tensors.get(f"{layer}/{name}") for name in Packed._fields}
                pair = (tensors[f"{layer}/B"], tensors[f"{layer}/A"]) if f"{layer}/B" in tensors else None
                done.append(Done(layer, Packed(**kept), Scheme(**scheme), pair, error, left))  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError) as error:
            raise RankfoldError(f"{self.path(name)} is damaged, remove it: {error}") from None
        window.carried = {key[8:]: tensor for key, tensor in tensors.items() if key.startswith("carried/")}
        return done

    def write(self, number: int, window: Window, done: list[Done]) -> None:
        tensors = {f"carried/{name}": tensor for name, tensor in window.carried.items()}
        for one in done:
            named = {**one.packed._asdict(), **({} if one.pair is None else dict(zip("BA", one.pair, strict=True)))}
            tensors |= {f"{one.path}/{name}": tensor for name, tensor in named.items() if tensor is not None}
        layers = [[one.path, one.scheme.model_dump(), one.error, one.left] for one in done]
        self._write(f"{number:04}", tensors, json.dumps(layers))

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What `write_tensors` kept under that name; None if nothing was."""
        found = self._read(name)
        return None if found is None else found[0]

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._write(name, tensors, "")

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        from safetensors import SafetensorError, safe_open

        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told: dict[str, str] = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise RankfoldError(f"{path} is damaged, remove it: {error}") from None
        if told.get("asked") != self.asked:
            raise RankfoldError(
                f"{self.folder} holds part of a quantisation of another model or with other arguments: finish that "
                "one first, or remove the folder"
            )
        return tensors, told.get("layers", "")

    def _write(self, name: str, tensors: Mapping[str, Tensor], layers: str) -> None:
        from safetensors.torch import save_file

        told = {"asked": self.asked, "layers": layers}
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_whole(self.path(name), lambda file: save_file(whole, file, told))


def _plain(value: Any) -> Any:
    """The value as JSON has it; of a tensor its hash."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
