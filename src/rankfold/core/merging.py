"""Writing adapters into the base weights, and taking them out again to the last bit."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.core.layers import pack_layer, unpack_layer
from rankfold.core.packed import PackedLinear
from rankfold.core.quantized import is_plain
from rankfold.core.routing import State, state_of
from rankfold.errors import RankfoldError, UnsupportedError


def merge(model: nn.Module, name: str | None = None) -> None:
    """Write an adapter (the active one by default) into the base weights, so that it costs nothing to run.

    The original weights are kept beside the merged ones until `unmerge` or `detach` puts them back, bit for bit.
    Several merged adapters act one after the other, in the order of merging, and can be unmerged in any order. While
    an adapter is merged, choosing it runs the base as it stands, and `state_dict` leaves its deltas out:
    `model.save_pretrained` then writes an ordinary model. A packed base stays packed under what changes its scales, and
    what ends in few bits itself leaves packed layers; `rankfold.save_quantized` writes those.

    A weight that is tied to another module's is untied first (with a warning, and `config.tie_word_embeddings` set to
    False so that a saved model stays untied); unmerging ties them again.

    Raises:
        UnsupportedError: the method's change is no matrix, or one that a base weight in few bits cannot take in.
        RankfoldError: unknown or already merged adapter, or the result holds NaN or infinity; nothing is changed.
    """
    state = state_of(model)
    name = _active(state) if name is None else state.check(name)
    if name in state.merged:
        raise RankfoldError(f"adapter {name!r} is merged already")
    for delta in state.adapters[name].deltas.values():
        if not delta.mergeable:
            raise UnsupportedError(
                f"{type(delta).__name__} at {delta.site.name} changes the output by a function of it, not by a ΔW: "
                "it cannot be merged"
            )
        if delta.strength is not None:
            raise RankfoldError(f"{delta.site.name}: a rank plan is weighing the layers of {name!r}; end it first")
        if delta.form not in ("bias", "scales") and not delta.packs and not is_plain(delta.site.stored):
            raise UnsupportedError(
                f"{delta.site.name} is quantised: merging would round its weight again and change what the model "
                "computes. Keep the adapter unmerged, or load the base in float and merge there"
            )
    _rewrite(state, (*state.merged, name))


def unmerge(model: nn.Module, name: str | None = None) -> None:
    """Take a merged adapter out of the base weights again, or all of them."""
    state = state_of(model)
    if name is not None and state.check(name) not in state.merged:
        raise RankfoldError(f"adapter {name!r} is not merged; merged are: {', '.join(state.merged) or 'none'}")
    _rewrite(state, () if name is None else tuple(other for other in state.merged if other != name))


def _active(state: State) -> str:
    if state.active is None:
        raise RankfoldError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    return state.active


@torch.no_grad()
def _rewrite(state: State, merged: tuple[str, ...]) -> None:
    """Make the base what `merged` says, from the original weights; all tensors are computed before any is set."""
    with state.lock:
        new: dict[str, Tensor] = {}
        packed: dict[str, PackedLinear] = {}
        for name in merged:
            for path, tensor, layer in _merged_tensors(state, state.adapters[name], new):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise RankfoldError(
                        f"merging {name!r} would put NaN or infinity into {path}; the base is unchanged"
                    )
                new[path] = tensor
                if layer is not None:
                    packed[path] = layer
        for path in state.originals.keys() - new.keys():
            _put(state.model, path, _like_now(state, path))
            del state.originals[path]
        _untie(state, [path for path in new if path not in state.originals])
        for path, tensor in new.items():
            state.originals.setdefault(path, _get(state.model, path))
            if path in packed:
                pack_layer(_layer(state.model, path), packed[path])
                continue
            now = state.originals[path]
            tensor = tensor.to(now.dtype)
            _put(
                state.model,
                path,
                nn.Parameter(tensor, requires_grad=False) if isinstance(now, nn.Parameter) else tensor,
            )
        if not state.originals:
            _tie_again(state)
        state.merged = merged
        state.activate(state.active)


def _merged_tensors(
    state: State, adapter: Adapter, new: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, PackedLinear | None]]:
    """What the adapter makes of `new`, or of the original weights; with the packed layer where it makes one."""

    def before(path: str) -> Tensor:
        return new[path] if path in new else _original(state, path)

    for delta in adapter.deltas.values():
        site = delta.site
        layer: Any = delta.layer
        path = site.name if site.kind == "experts" else f"{site.name}.{site.parameter}"
        if delta.form == "scales":
            path = f"{site.name}.scales"
            s = before(path)
            yield path, delta.scales(s.to(site.dtype)).to(s.dtype), None
        elif delta.form != "bias":
            W = layer.to_matrix(before(path))
            dtype, W = W.dtype, W if W.dtype == torch.float64 else W.float()
            merged, packed = layer.from_matrix(delta.adapted_weight(W)).to(dtype).contiguous(), None
            if delta.packs:
                packed = PackedLinear.of(layer, *delta.pack(W))
                packed.dtype = dtype
            yield path, merged, packed
        if delta.biased and layer.own_bias is not None:
            path = f"{site.name}.bias"
            change = delta.bias_update(before(path))
            if change is not None:
                yield path, before(path) + change.to(before(path).dtype), None
    for path, copied in adapter.modules.items():
        for name, tensor in (*copied.module.named_parameters(), *copied.module.named_buffers()):
            yield f"{path}.{name}", tensor.detach().clone(), None


def _original(state: State, path: str) -> Tensor:
    return state.originals[path] if path in state.originals else _get(state.model, path)


def _like_now(state: State, path: str) -> Any:
    """The original, where the model was meanwhile moved to another device or dtype: moved likewise."""
    original, now, layer = state.originals[path], _get(state.model, path), _layer(state.model, path)
    dtype = now.dtype
    if not now.is_floating_point():  # codes, of a layer whose scales tell
        dtype = original.dtype if layer.scales.dtype == getattr(torch, layer.scheme.scales) else layer.scales.dtype
    if (original.device, original.dtype) != (now.device, dtype):
        original.data = original.data.to(device=now.device, dtype=dtype)
    return original


def _layer(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path.rpartition(".")[0])


def _home(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    module, leaf = _layer(model, path), path.rpartition(".")[2]
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _get(model: nn.Module, path: str) -> Any:
    home, leaf = _home(model, path)
    return home[leaf]


def _put(model: nn.Module, path: str, tensor: Any) -> None:
    home, leaf = _home(model, path)
    if leaf == "weight":
        unpack_layer(_layer(model, path))
    home[leaf] = tensor


def _untie(state: State, paths: list[str]) -> None:
    """Say which tied weights come apart. Replacing the parameter of one module is what separates them."""
    changed = {id(_get(state.model, path)): path for path in paths}
    config = getattr(state.model, "config", None)
    for other, parameter in state.model.named_parameters(remove_duplicate=False):
        path = changed.get(id(parameter))
        if path is not None and other not in paths and _home(state.model, path)[0] is not _home(state.model, other)[0]:
            warnings.warn(
                f"{path} is tied to {other}: merging gives it a weight of its own, and {other} stays as it was",
                stacklevel=5,
            )
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # type: ignore[union-attr]
                state.untied = True


def _tie_again(state: State) -> None:
    if state.untied:
        state.model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        state.untied = False
