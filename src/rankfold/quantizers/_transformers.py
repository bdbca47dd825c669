"""Packed models in Transformers: saved by `save_pretrained`, loaded by `from_pretrained`, no float weight between.

Importing this registers the format "rankfold" with Transformers. Models in the files of GPTQ's tools are written and
read too; their format has an own reader in Transformers, which needs these tools, so ours goes by another name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import rankfold
from rankfold.core.codebooks import CodebookLinear, Codebooks
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.core.routing import find_state
from rankfold.core.targets import submodule
from rankfold.errors import RankfoldError
from rankfold.quantizers._gptq_files import GPTQTensors, configuration, tensors

METHOD, GPTQ_METHOD = "rankfold", "rankfold-gptq"


class PackedConfig(QuantizationConfigMixin):
    """The schemes of a model's packed layers, each with the paths that have it. What `config.json` says is checked."""

    def __init__(self, schemes: Any = (), quant_method: str = METHOD, version: str = rankfold.__version__):
        self.quant_method: Any = quant_method
        self.version = version
        try:
            read = [(_scheme(one["scheme"]), [str(path) for path in one["layers"]]) for one in schemes]
        except (ValidationError, KeyError, TypeError) as error:
            raise RankfoldError(
                f"config.json: quantization_config names no schemes that can be read: {error}"
            ) from None
        self.schemes = [{"scheme": scheme.model_dump(), "layers": paths} for scheme, paths in read]

    @property
    def layers(self) -> dict[str, Scheme | Codebooks]:
        return {path: _scheme(one["scheme"]) for one in self.schemes for path in one["layers"]}


def _scheme(told: Any) -> Scheme | Codebooks:
    return (Codebooks if "books" in told else Scheme).model_validate(told)


class PackedQuantizer(HfQuantizer):
    """Puts empty packed layers in their places before the weights are read into them."""

    requires_calibration = True  # that is: it only loads what was quantised before

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        for path, scheme in config.layers.items():
            old = submodule(model, path)
            if type(old) is not nn.Linear:
                raise RankfoldError(f"config.json packs {path}, and {type(model).__name__} has no linear layer there")
            bias, dtype = old.bias is not None, old.weight.dtype
            kind: Any = CodebookLinear if isinstance(scheme, Codebooks) else PackedLinear
            _put(model, path, kind(old.in_features, old.out_features, scheme, bias, dtype, "meta"))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class GPTQFiles(QuantizationConfigMixin):
    """What GPTQ's tools say in config.json."""

    def __init__(self, group_size: Any = -1, quant_method: str = GPTQ_METHOD, **told: Any):
        self.quant_method: Any = quant_method
        form = told.get("checkpoint_format") or told.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2") or not isinstance(group_size, int) or group_size == 0:
            raise RankfoldError(f"config.json: no GPTQ files that can be read: {form!r}, groups of {group_size!r}")
        self.group_size, self.form = group_size, form


class GPTQReader(PackedQuantizer):
    """Reads the tensors of GPTQ's files into the places of linear layers, and makes packed ones of them one by one."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        found = _gptq_tensors(kwargs["checkpoint_files"] or [])
        if not found:
            raise RankfoldError("config.json says gptq, and no safetensors file holds a qweight")
        for path, (shapes, scales) in found.items():
            path = path if submodule(model, path) else path.removeprefix(f"{model.base_model_prefix}.")
            old = submodule(model, path)
            if type(old) is not nn.Linear:
                raise RankfoldError(f"the file packs {path}, and {type(model).__name__} has no linear layer there")
            group = config.group_size if config.group_size > 0 else old.in_features
            _put(model, path, GPTQTensors(old, shapes, scales, group))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        for path, module in list(model.named_modules()):
            if isinstance(module, GPTQTensors):
                _put(model, path, module.packed(config.form == "gptq_v2"))
        mark(model)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    (model.get_submodule(parent) if parent else model)._modules[name] = layer


def _gptq_tensors(files: list[str]) -> dict[str, tuple[dict[str, tuple[int, ...]], torch.dtype]]:
    """The packed layers in safetensors files: the shapes of their tensors, and the dtype of their scales."""
    from safetensors import safe_open

    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    for name in files:
        with safe_open(name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                path, _, part = key.rpartition(".")
                if part in ("qweight", "qzeros", "scales", "g_idx"):
                    shapes.setdefault(path, {})[part] = tuple(file.get_slice(key).get_shape())
                if part == "scales":
                    dtypes[path] = known[file.get_slice(key).get_dtype()]
    return {path: (parts, dtypes[path]) for path, parts in shapes.items() if {"qweight", "scales"} <= parts.keys()}


register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)
register_quantization_config(GPTQ_METHOD)(GPTQFiles)
register_quantizer(GPTQ_METHOD)(GPTQReader)


def mark(model: Any) -> None:
    """Tell Transformers, in the model's configuration, which of its layers are packed."""
    by_scheme: dict[Scheme | Codebooks, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear | CodebookLinear):
            by_scheme.setdefault(module.scheme, []).append(path)
    if not by_scheme:
        raise RankfoldError("the model has no packed layer: quantise it first")
    schemes = [{"scheme": scheme.model_dump(), "layers": paths} for scheme, paths in by_scheme.items()]
    config = PackedConfig(schemes=schemes)
    model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized, model.quantization_method = PackedQuantizer(config), True, METHOD


def save_quantized(
    model: Any, folder: str | Path, processor: Any = None, *, format: Literal["rankfold", "gptq"] = "rankfold"
) -> Path:
    """Write a packed model of Transformers, with its tokenizer or image processor, whole or not at all.

    Adapters that are on it (a compensation) are taken off, and saved within, in folders of their names; those that are
    merged stay. `format="gptq"` writes the files of GPTQ's tools, which vLLM, GPTQModel and Transformers read. Raises
    RankfoldError where nothing is packed, and UnsupportedError where the format has no place for a layer.
    """
    from rankfold.train.models import save_directory

    mark(model)
    hooks: list[Any] = []

    def before(work: Path) -> None:
        state = find_state(model)
        for name in sorted(rankfold.adapters(model).keys() - (() if state is None else state.merged)):
            rankfold.save(model, work / name, name=name)
            rankfold.detach(model, name)
        if format == "gptq":
            hooks.extend(_as_gptq(model))

    try:
        save_directory(model, processor, Path(folder), before=before)
    finally:
        for hook in hooks:
            hook.remove()
        mark(model)
    return Path(folder)


def _as_gptq(model: Any) -> list[Any]:
    """Hooks under which the model's state_dict is that of GPTQ's files; its configuration says so already."""
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {path: module for path, module in linear.items() if isinstance(module, PackedLinear)}
    head = model.get_output_embeddings()
    left = [path for path, module in linear.items() if path not in layers and module is not head]
    model.config.quantization_config = told = configuration(layers, left, rankfold.__version__)

    def publish(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        state.update({prefix + name: tensor for name, tensor in tensors(layer, told["format"] == "gptq_v2").items()})

    return [layer.register_state_dict_post_hook(publish) for layer in layers.values()]


def load_quantized(folder: str | Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The packed model in a folder or hub id, by `auto.from_pretrained`: an Auto class of Transformers, or a model's.

    That is what `save_quantized` wrote, or the files of GPTQ's tools. Layers are read packed, one by one. Raises
    RankfoldError where it holds no such model.
    """
    where = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    model = auto.from_pretrained(folder, **reading(folder, **where), **options)
    if not isinstance(getattr(model.config, "quantization_config", None), PackedConfig | Mapping):
        raise RankfoldError(f"{folder} holds no model that rankfold has quantised: from_pretrained loads it")
    return model


def reading(folder: str | Path, **options: Any) -> dict[str, Any]:
    """What `from_pretrained` is told besides, so that we read GPTQ's files: a configuration that names our reader."""
    config = AutoConfig.from_pretrained(folder, **options)
    told: Any = getattr(config, "quantization_config", None)
    if not isinstance(told, dict) or told.get("quant_method") != "gptq":
        return {}
    config.quantization_config = {**told, "quant_method": GPTQ_METHOD}
    return {"config": config}
