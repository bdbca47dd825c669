"""`adapter_config.json`: the options of PEFT that we read, those that change nothing for us, and those we refuse."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rankfold.errors import AdapterFileError, UnsupportedError

# Who made the adapter, how it started and what only a running PEFT needs. `fan_in_fan_out` follows from the layer.
_NO_EFFECT = {
    "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "runtime_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "init_ia3_weights", "init_weights",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
# What an option must be, where that is not "off", and what to do otherwise.
_FIXED: dict[str, tuple[Any, str]] = {
    "bias": ("none", "it trains the base's own biases; Rankfold keeps those apart, as the method 'bitfit'"),
}
_HINTS = {
    "trainable_token_indices": "train the whole embedding instead, with modules_to_save",
    "lora_bias": "a LoRA's factors have no bias here",
    "layer_replication": "build the deeper model first, then import an adapter that names its layers",
    "ensure_weight_tying": "save it untied: Rankfold adapts the two sides of a tied weight apart",
}
# Starts that leave the base weights as they are. After the others (pissa, olora, corda, loftq, lora_ga) the saved
# factors are only half of the adapter: the other half was taken out of the base.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Number = Annotated[int, Field(ge=0, lt=1 << 31)]
Probability = Annotated[FiniteFloat, Field(ge=0, lt=1)]
_Name = Annotated[str, Field(min_length=1, max_length=1000)]
_Names = list[_Name]


class Options(BaseModel):
    """The options of every method that we read."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: str | _Names | None = None
    exclude_modules: str | _Names | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | _Names | None = None
    modules_to_save: _Names | None = None

    @property
    def unread(self) -> dict[str, Any]:
        return self.model_extra or {}


class LoraOptions(Options):
    r: Size = 8
    lora_alpha: FiniteFloat = 8
    lora_dropout: Probability = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[_Name, Size] | None = None
    alpha_pattern: dict[_Name, FiniteFloat] | None = None
    target_parameters: _Names | None = None
    init_lora_weights: bool | str = True


class VeraOptions(Options):
    r: Size = 256
    vera_dropout: Probability = 0.0
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: FiniteFloat = 0.1


class Ia3Options(Options):
    feedforward_modules: str | _Names | None = None


class RandLoraOptions(Options):
    r: Size = 32
    randlora_alpha: FiniteFloat = 640
    randlora_dropout: Probability = 0.0
    save_projection: bool = True
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False


class MissOptions(Options):
    r: Size = 64
    mini_r: Size = 1
    miss_dropout: Probability = 0.0
    init_weights: bool | Literal["bat", "mini"] = True


class OftOptions(Options):
    r: Number = 0
    oft_block_size: Number = 32
    module_dropout: Probability = 0.0  # PEFT makes it and never calls it
    eps: FiniteFloat = 0.0  # of `coft`
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=0, le=1000)] = 5
    peft_version: str | None = None


class BoftOptions(Options):
    boft_block_size: Number = 4
    boft_block_num: Number = 0
    boft_n_butterfly_factor: Annotated[int, Field(ge=1, le=31)] = 1
    boft_dropout: Probability = 0.0


class LycorisOptions(Options):
    r: Size = 8
    alpha: FiniteFloat = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    rank_pattern: dict[_Name, Size] | None = None
    alpha_pattern: dict[_Name, FiniteFloat] | None = None


class LohaOptions(LycorisOptions): ...


class LokrOptions(LycorisOptions):
    rank_dropout_scale: bool = False
    decompose_both: bool = False
    decompose_factor: Literal[-1] | Size = -1


class FourierOptions(Options):
    n_frequency: Size = 1000
    n_frequency_pattern: dict[_Name, Size] | None = None
    scaling: FiniteFloat = 150.0
    random_loc_seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 777


class AdaLoraOptions(Options):
    init_r: Size = 12
    r: Number = 8  # a LoRA's: not used
    lora_alpha: FiniteFloat = 8
    lora_dropout: Probability = 0.0
    init_lora_weights: bool = True
    rank_pattern: dict[_Name, list[bool]] | None = None


def check(parsed: Any, types: Mapping[str, type[Options]], what: str) -> Any:
    """The options of a parsed `adapter_config.json`. Raises AdapterFileError for what is malformed, UnsupportedError,
    by name, for a method or an option that would make the adapter compute something else here."""
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"{what} is no JSON object")
    kind = parsed.get("peft_type")
    if not isinstance(kind, str) or kind not in types:
        raise UnsupportedError(
            f"{what}: peft_type is {str(kind)[:40]!r}; Rankfold reads {', '.join(types)}. "
            "Of some other methods PEFT itself can make a LoRA: peft.save_as_lora"
        )
    try:
        options = types[kind].model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterFileError(f"{what}: {'.'.join(map(str, first['loc']))[:200]!r}: {first['msg']}") from None
    for option, value in options.unread.items():
        fixed, hint = _FIXED.get(option, (None, _HINTS.get(option, "")))
        if option in _NO_EFFECT or value == fixed or value in (None, False, "", [], {}):
            continue
        raise UnsupportedError(
            f"{what}: {option[:80]!r} is {str(value)[:80]!r}, which Rankfold does not support{': ' * bool(hint)}{hint}"
        )
    start = getattr(options, "init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedError(
            f"{what}: 'init_lora_weights' is {start[:40]!r}, a start that changes the base weights, and the change "
            "is not in the file. In PEFT, save the adapter with path_initial_model_for_weight_conversion first: that "
            "makes a plain LoRA of it"
        )
    return options
