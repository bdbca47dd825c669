"""Packed models in Transformers: saved by `save_pretrained`, loaded by `from_pretrained`, no float weight between.

Importing this registers the format "rankfold" with Transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import rankfold
from rankfold.core.packed import PackedLinear, Scheme
from rankfold.core.targets import submodule
from rankfold.errors import RankfoldError

METHOD = "rankfold"


class PackedConfig(QuantizationConfigMixin):
    """The schemes of a model's packed layers, each with the paths that have it. What `config.json` says is checked."""

    def __init__(self, schemes: Any = (), quant_method: str = METHOD, version: str = rankfold.__version__):
        self.quant_method: Any = quant_method
        self.version = version
        try:
            read = [(Scheme.model_validate(one["scheme"]), [str(path) for path in one["layers"]]) for one in schemes]
        except (ValidationError, KeyError, TypeError) as error:
            raise RankfoldError(
                f"config.json: quantization_config names no schemes that can be read: {error}"
            ) from None
        self.schemes = [{"scheme": scheme.model_dump(), "layers": paths} for scheme, paths in read]

    @property
    def layers(self) -> dict[str, Scheme]:
        return {path: Scheme(**one["scheme"]) for one in self.schemes for path in one["layers"]}


class PackedQuantizer(HfQuantizer):
    """Puts empty packed layers in their places before the weights are read into them."""

    requires_calibration = True  # that is: it only loads what was quantised before

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        for path, scheme in config.layers.items():
            parent, _, name = path.rpartition(".")
            within, old = submodule(model, parent) if parent else model, submodule(model, path)
            if within is None or type(old) is not nn.Linear:
                raise RankfoldError(f"config.json packs {path}, and {type(model).__name__} has no linear layer there")
            bias, dtype = old.bias is not None, old.weight.dtype
            within._modules[name] = PackedLinear(old.in_features, old.out_features, scheme, bias, dtype, "meta")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


register_quantization_config(METHOD)(PackedConfig)
register_quantizer(METHOD)(PackedQuantizer)


def mark(model: Any) -> None:
    """Tell Transformers, in the model's configuration, which of its layers are packed."""
    by_scheme: dict[Scheme, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            by_scheme.setdefault(module.scheme, []).append(path)
    if not by_scheme:
        raise RankfoldError("the model has no packed layer: quantise it first")
    schemes = [{"scheme": scheme.model_dump(), "layers": paths} for scheme, paths in by_scheme.items()]
    config = PackedConfig(schemes=schemes)
    model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized, model.quantization_method = PackedQuantizer(config), True, METHOD


def save_quantized(model: Any, folder: str | Path, processor: Any = None) -> Path:
    """Write a packed model of Transformers, with its tokenizer or image processor, whole or not at all.

    Adapters that are on it (a compensation) are taken off, and saved within, in folders of their names. Raises
    RankfoldError where nothing is packed.
    """
    from rankfold.train.models import save_directory

    mark(model)

    def adapters(work: Path) -> None:
        for name in rankfold.adapters(model):
            rankfold.save(model, work / name, name=name)
        if rankfold.adapters(model):
            rankfold.detach(model)

    save_directory(model, processor, Path(folder), before=adapters)
    return Path(folder)


def load_quantized(folder: str | Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model that `save_quantized` wrote, by `auto.from_pretrained`: an Auto class of Transformers, or a model's.

    Layers are read packed, as they lie in the file. Raises RankfoldError where it holds no packed model.
    """
    model = auto.from_pretrained(folder, **options)
    if not isinstance(getattr(model.config, "quantization_config", None), PackedConfig | Mapping):
        raise RankfoldError(f"{folder} holds no model that rankfold has quantised: from_pretrained loads it")
    return model
