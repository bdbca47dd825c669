"""A pretrained model's weights on disk, read one tensor at a time, without the model."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rankfold.core.files import adapter_folder
from rankfold.errors import AdapterFileError, RankfoldError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Which safetensors file holds which tensor; nothing is read before it is asked for."""

    source: str
    files: dict[str, Path]

    @classmethod
    def find(cls, source: str) -> "WeightFiles":
        """The weights of a safetensors file, a Transformers directory (one file or sharded), a hub id or a GGUF file.

        A GGUF file is de-quantised once and kept in the user's cache. Raises RankfoldError for anything else.
        """
        path = Path(source).expanduser()
        if path.suffix.lower() == ".gguf" and path.is_file():
            from rankfold.train.models import gguf_directory  # needs transformers, which the rest of the core does not

            path = gguf_directory(path)
        if path.is_file():
            return cls(source, dict.fromkeys(_names(path), path))
        try:
            folder = adapter_folder(path if path.is_dir() else source, ["*.safetensors", INDEX], "save_pretrained")
        except AdapterFileError as error:
            raise RankfoldError(f"no weights at {source!r}: {error}") from None
        if (folder / INDEX).is_file():
            return cls(source, _sharded(folder))
        if (folder / WHOLE).is_file():
            return cls(source, dict.fromkeys(_names(folder / WHOLE), folder / WHOLE))
        raise RankfoldError(f"{source} holds neither {WHOLE} nor {INDEX}: save the model with safetensors first")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the dtype it is stored in.

        A base model's names lack what the model with a head puts in front (`model.`), and the other way round: where
        the name itself is not there, the one that ends like it is taken. Raises RankfoldError if none or several do.
        """
        from safetensors import SafetensorError, safe_open

        found = [name] if name in self.files else [at for at in self.files if _alike(at, name)]
        if len(found) != 1:
            there = ", ".join(found or list(self.files)[:3])
            raise RankfoldError(f"{self.source} holds {len(found) or 'no'} tensors like {name!r}; there are: {there}")
        try:
            with safe_open(self.files[found[0]], "pt") as file:
                return file.get_tensor(found[0])
        except (OSError, SafetensorError) as error:
            raise RankfoldError(f"cannot read {found[0]} from {self.files[found[0]]}: {error}") from None


def _alike(a: str, b: str) -> bool:
    return a.endswith("." + b) or b.endswith("." + a)


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RankfoldError(f"cannot read {path} as safetensors: {error}") from None


def _sharded(folder: Path) -> dict[str, Path]:
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): folder / Path(shard).name for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RankfoldError(f"{folder / INDEX} is no index of shards ({type(error).__name__}: {error})") from None
