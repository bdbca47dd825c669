"""Models with paged experts in folders: saved with the experts packed apart, loaded without them.

    chosen = profile(model, batches).choose(budget=200 << 20)
    save_paged(model, "packed", chosen, tokenizer)

    model, pages = load_paged("packed", cache=64)
    model.generate(...)
    print(pages.stats)

Importing this registers the format "rankfold-experts" with Transformers, whose `from_pretrained` then makes no room for
experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankfold.core.packed import Scheme
from rankfold.errors import RankfoldError
from rankfold.serve.expert_files import FILE, Expert, expert_layers, let_go, pack_experts, weight_names
from rankfold.serve.experts import PagedExperts
from rankfold.serve.paging import Policy

METHOD = "rankfold-experts"


class PagedConfig(QuantizationConfigMixin):
    """Says in `config.json` that the experts are in a file of their own."""

    def __init__(self, quant_method: str = METHOD):
        self.quant_method: Any = quant_method


class PagedReader(HfQuantizer):
    """Takes the experts' weights out of the empty model before the others are read into it."""

    requires_calibration = True  # that is: it only loads what was packed before

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for module in expert_layers(model).values():
            let_go(module)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


register_quantization_config(METHOD)(PagedConfig)
register_quantizer(METHOD)(PagedReader)


def save_paged(
    model: Any,
    folder: str | Path,
    widths: Mapping[Expert, int] | int = 4,
    processor: Any = None,
    *,
    scheme: Scheme | None = None,
) -> Path:
    """Write a Transformers model, its experts packed in a file of their own, whole or not at all.

    Args:
        model: with its experts' weights, unadapted; it is as before then.
        folder: what is in it is replaced.
        widths: bits of each expert or of all, see `pack_experts`.
        processor: tokenizer that is saved along.
        scheme: as for `pack_experts`.
    """
    from rankfold.train.models import save_directory

    apart = {f"{path}.{name}" for path, module in expert_layers(model).items() for name in weight_names(module)}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in apart}
    if getattr(model.config, "quantization_config", None) is not None:
        raise RankfoldError("the model is quantised already: take the one with float weights")
    model.config.quantization_config = PagedConfig()
    try:

        def experts(work: Path) -> None:
            pack_experts(model, work / FILE, widths, scheme)

        save_directory(model, processor, Path(folder), rest, before=experts)
    finally:
        del model.config.quantization_config
    return Path(folder)


def load_paged(
    folder: str | Path,
    cache: int,
    *,
    policy: Policy = "frequency",
    prefetch: bool = True,
    auto: Any = AutoModelForCausalLM,
    **options: Any,
) -> tuple[Any, PagedExperts]:
    """The model that `save_paged` wrote, by `auto.from_pretrained(folder, **options)`, and the pages of its experts.

    `cache`, `policy` and `prefetch` are those of `PagedExperts`.
    """
    model = auto.from_pretrained(folder, **options)
    return model.eval(), PagedExperts(model, Path(folder) / FILE, cache, policy=policy, prefetch=prefetch)
