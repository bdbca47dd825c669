"""Adapters of any method for vLLM's multi-LoRA serving: a folder of PEFT files each, and one manifest."""

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rankfold.core.adapter import Adapter
from rankfold.core.checkpoint import load
from rankfold.core.control import adapters, detach
from rankfold.core.convert import as_lora, put_beside
from rankfold.core.document import TENSORS
from rankfold.core.files import fill_whole
from rankfold.core.peft import TENSORS as PEFT_TENSORS
from rankfold.core.peft import export_peft, import_peft
from rankfold.core.routing import NAME
from rankfold.deltas.lora import LoRA
from rankfold.errors import RankfoldError, UnsupportedError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
MANIFEST = "manifest.json"
_OWN = "vllm-export"


def adapter_folders(given: Iterable[Path]) -> dict[str, Path]:
    """The folders that hold an adapter, Rankfold's or PEFT's, by their own names: those given, or inside those given.

    Raises RankfoldError for a folder without any, a name that vLLM's command line cannot hold, and one there twice.
    """
    found: dict[str, Path] = {}
    for folder in given:
        inside = [folder] if holds_adapter(folder) else sorted(p for p in folder.glob("*") if holds_adapter(p))
        if not inside:
            raise RankfoldError(f"{folder} holds no adapter, nor do folders in it")
        for path in inside:
            name = path.resolve().name
            if not NAME.fullmatch(name) or "=" in name:
                raise RankfoldError(f"{path}: an adapter is called as its folder, and NAME=PATH cannot hold that name")
            if name in found:
                raise RankfoldError(f"{found[name]} and {path} have one name: rename one of the folders")
            found[name] = path
    if not found:
        raise RankfoldError("no adapter was given: name folders of adapters, or folders that hold them")
    return found


def holds_adapter(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (TENSORS, PEFT_TENSORS))


def export_vllm(
    model: nn.Module,
    folders: Iterable[str | Path],
    output: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Write adapters so that `vllm serve` loads them all, side by side, whole or not at all.

    vLLM serves plain LoRAs of linear layers, of one rank and scale each, without biases and modules in full, and reads
    no `rank_pattern` or `alpha_pattern`. So every adapter goes by way of `as_lora`, its scale within B; layers of lower
    rank are filled up with zeros to the adapter's highest, which changes nothing. What `as_lora` loses is told.

    Args:
        model: the base model that the adapters are of; it is as before then.
        folders: of adapters, or of folders of adapters, Rankfold's or PEFT's. A folder's name is the adapter's.
        output: takes a folder for each adapter, and `manifest.json`; what is in it is replaced.
        base: what vLLM shall call the base model by; default: as the model's configuration does.
        rank: the most that a layer may have; default: vLLM's own limit, 512.
        progress: called before each adapter, with its name.

    Returns:
        the manifest: `base`, `max_lora_rank`, `command`, which starts vLLM in `output`, and of each of `adapters` its
        `name`, `path` in `output`, `rank`, `method`, and `error`, the largest of its layers (see `as_lora`).

    Raises:
        UnsupportedError: an adapter has no ΔW, or adapts what vLLM does not; the message names it.
        AdapterFileError: an adapter's files are missing, damaged, or of another model.
    """
    most = RANKS[-1] if rank is None else rank
    if not 1 <= most <= RANKS[-1]:
        raise RankfoldError(f"rank {rank}: vLLM takes 1 to {RANKS[-1]}")
    base = base or getattr(getattr(model, "config", None), "name_or_path", None)
    if not base:
        raise RankfoldError("the model's configuration does not say what it is called: give base=")
    found = adapter_folders(map(Path, folders))
    manifest: dict[str, Any] = {}

    def write(work: Path) -> None:
        written = []
        for name, folder in found.items():
            if progress is not None:
                progress(name)
            try:
                written.append({"name": name, "path": name, **_export(model, folder, work / name, most)})
            except UnsupportedError as error:
                raise UnsupportedError(f"{folder}: vLLM cannot serve it: {error}") from error
        highest = next(r for r in RANKS if r >= max(one["rank"] for one in written))
        modules = [f"{name}={name}" for name in found]
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(highest), "--lora-modules", *modules]
        manifest.update(base=base, max_lora_rank=highest, command=shlex.join(command), adapters=written)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    fill_whole(Path(output), write)
    return manifest


@torch.no_grad()
def _export(model: nn.Module, folder: Path, target: Path, most: int) -> dict[str, Any]:
    """One adapter, put on the model for that long."""
    names = [_OWN, f"{_OWN}-lora", f"{_OWN}-even"]
    read = load if (folder / TENSORS).is_file() else import_peft
    adapter = read(model, folder, names[0], active=False)
    try:
        _check(adapter)
        lora, errors = as_lora(model, names[0], most, new_name=names[1])
        pairs = {site: delta.pair() for site, delta in lora.deltas.items()}
        r = max(A.shape[-2] for _, A in pairs.values())
        even = {
            site: (F.pad(B, (0, r - B.shape[-1])), F.pad(A, (0, 0, 0, r - A.shape[-2])))
            for site, (B, A) in pairs.items()
        }
        put_beside(lora, even, dict.fromkeys(even, LoRA(rank=r, alpha=r)), names[2], {})
        export_peft(model, target, names[2])
        return {"rank": r, "method": adapter.method.slug, "error": max(errors.values())}
    finally:
        for name in set(names) & set(adapters(model)):
            detach(model, name)


def _check(adapter: Adapter) -> None:
    if adapter.modules:
        raise UnsupportedError(f"it trains modules in full ({', '.join(adapter.modules)})")
    for site in adapter.sites:
        if site.kind not in ("linear", "conv1d"):
            raise UnsupportedError(f"it adapts {site.name}, which is no linear layer ({site.kind})")
