"""Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Written and read without PEFT. What either side cannot say of the other is refused by name; nothing is dropped silently.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter, check_finite
from rankfold.core.attach import build_adapter
from rankfold.core.delta import Site
from rankfold.core.files import adapter_folder, open_inside, parse_json, write_whole
from rankfold.core.layers import AdaptedConv1D, AdaptedExperts, AdaptedLinear, kind_of
from rankfold.core.peft._config import check
from rankfold.core.peft._formats import OPTIONS, WRITTEN, Format, format_of
from rankfold.core.peft._names import Names, name_list, name_pattern
from rankfold.core.routing import find_state, state_of, unwrapped
from rankfold.core.targets import Target, inside_adapter, submodule
from rankfold.core.tensorfile import Entry, TensorFile, apart, read_exactly
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG = 8 << 20
_PREFIXES = ("base_model.model.", "base_model.")
# Transformers' class names, PEFT's task, and the heads that PEFT trains along with it by itself.
_TASKS = (
    (r".*(ForCausalLM|LMHeadModel)", "CAUSAL_LM", ()),
    (r".*ForConditionalGeneration", "SEQ_2_SEQ_LM", ()),
    (r".*ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    (r".*ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    (r".*ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
)


# ---- writing


def export_peft(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Write an adapter (default: the active one) into a folder that `peft.PeftModel.from_pretrained` and vLLM load.

    LoRA, DoRA, AdaLoRA's SVD, VeRA, (IA)³, RandLoRA, MiSS, Bone (PEFT's MiSS too), OFT, BOFT, LoHa, LoKr and FourierFT
    have a form of their own in PEFT, with the same tensors. A LoRA whose start was taken out of the base (PiSSA, ...)
    becomes the plain LoRA of rank 2r that does the same. Any other method with a ΔW goes by way of `rankfold.as_lora`,
    whose adapter is a plain LoRA.

    vLLM serves plain LoRAs of linear layers whose rank is at most its `max_lora_rank`. It reads `r` and `lora_alpha`
    but no `rank_pattern`, `alpha_pattern` or `modules_to_save`: give it an adapter with one rank and one alpha.

    Raises:
        UnsupportedError: PEFT has no way to say what the adapter does; the message says what would work.
        RankfoldError: no such adapter, `path` is a file, or a tensor holds NaN or infinity.

    Nothing is written then.
    """
    state = state_of(model)
    name = state.active if name is None else state.check(name)
    if name is None:
        raise RankfoldError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise RankfoldError(f"{path} is a file; an adapter is written into a folder")
    adapter = state.adapters[name]
    format = _format(adapter)
    tensors = {f"base_model.model.{key}": tensor for key, tensor in _tensors(format, adapter).items()}
    tensors |= {f"base_model.{key}": tensor.detach() for key, tensor in format.shared_tensors(adapter).items()}
    check_finite(tensors, f"adapter {name!r} is not exported")
    config = _config(format, adapter)

    def write(file: Path) -> None:
        from safetensors.torch import save_file

        save_file(apart(tensors), file, metadata={"format": "pt"})

    write_whole(path / TENSORS, write)
    write_whole(path / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
    return path


def _format(adapter: Adapter) -> Format:
    slug = adapter.method.slug
    format = WRITTEN.get(slug)
    if format is None:
        fix = f"call rankfold.as_lora(model, {adapter.name!r}) first, and export its adapter {adapter.name + '-lora'!r}"
        if any(delta.form in ("function", "bias") for delta in adapter.deltas.values()):
            fix = "and it has no ΔW that a LoRA could hold"
        raise UnsupportedError(f"PEFT has no method like {slug!r} of adapter {adapter.name!r}; {fix}")
    if not adapter.deltas:
        raise UnsupportedError(
            f"adapter {adapter.name!r} only trains modules in full, and PEFT loads no adapter without an adapted layer"
        )
    for site in adapter.sites:
        if reason := format.refusal(site):
            raise UnsupportedError(f"{slug} at {site.name} cannot be exported: {reason}. rankfold.as_lora may help")
    return format


def _tensors(format: Format, adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of the layers and modules, by PEFT's names without their prefix."""
    tensors = {}
    for delta in adapter.deltas.values():
        path = _path(delta.site, adapter.sites)
        for own, tensor in format.tensors(delta).items():
            tensors[f"{path}.{format.leaf(own, delta.site)}"] = format.to_peft(own, tensor, delta)
    for path, copied in adapter.modules.items():
        tensors |= {f"{path}.{key}": tensor for key, tensor in copied.module.state_dict().items()}
    return tensors


def _path(site: Site, sites: Iterable[Site]) -> str:
    """The path of the layer; of several weights of one experts module, PEFT wraps the later ones around the earlier."""
    if site.kind != "experts":
        return site.name
    order = list(site.layer._parameters)
    later = [s for s in sites if s.layer is site.layer and order.index(s.parameter) > order.index(site.parameter)]
    return site.name.removesuffix(f".{site.parameter}") + ".base_layer" * len(later)


def _config(format: Format, adapter: Adapter) -> dict[str, Any]:
    model = adapter.model
    everything = [path for path, _ in model.named_modules() if path and not inside_adapter(path)]
    every_path = [path for path, _ in model.named_modules(remove_duplicate=False) if path and not inside_adapter(path)]
    experts = [site.name for site in adapter.sites if site.kind == "experts"]
    groups = [[site for site in group if site not in experts] for group in format.groups(adapter)]
    layers = [site for group in groups for site in group]
    config: dict[str, Any] = {
        "peft_type": format.peft_type,
        "task_type": _task(adapter, every_path),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        **format.hyperparameters(adapter, everything),
        "target_modules": [name for group in groups for name in name_list(group, everything)],
        "modules_to_save": list(adapter.modules) or None,
    }
    if experts:
        config["target_parameters"] = experts
    if _selected(config, everything) != set(layers):
        config["target_modules"] = name_pattern(layers)
    saved = {path for path in every_path if Names(config).saves(path)}
    if _selected(config, everything) != set(layers) or saved != set(adapter.modules):
        raise UnsupportedError(
            f"PEFT's configuration cannot single out the layers of adapter {adapter.name!r}: the modules trained in "
            f"full ({', '.join(adapter.modules)}) have names that others end in or are inside"
        )
    return config


def _selected(config: Mapping[str, Any], everything: Iterable[str]) -> set[str]:
    names = Names(config)
    return {path for path in everything if names.selects(path, linear=False)}


def _task(adapter: Adapter, every_path: list[str]) -> str | None:
    """PEFT's task; None where PEFT would look for a trained head in the file that this adapter does not have."""
    cls = getattr(adapter.model, "_plain", type(adapter.model)).__name__
    for pattern, task, heads in _TASKS:
        if re.fullmatch(pattern, cls):
            trained = all(path in adapter.modules for path in every_path if path.endswith(heads))
            encoder_decoder = getattr(getattr(adapter.model, "config", None), "is_encoder_decoder", False)
            return task if trained and (task != "SEQ_2_SEQ_LM" or encoder_decoder) else None
    return None


# ---- reading


def import_peft(model: nn.Module, path: str | Path, name: str | None = None, *, active: bool = True) -> Adapter:
    """Attach an adapter that PEFT saved.

    Args:
        model: the base model; other adapters may be attached.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a Hugging Face Hub id
            (`org/name`).
        name: what to call it; default: "default".
        active: whether plain forwards use it from now on.

    Raises:
        AdapterFileError: the files are missing, damaged or hostile, or were made for another model.
        UnsupportedError: the adapter uses a method or an option of PEFT that Rankfold does not have, given by name.
        RankfoldError: the name is taken or malformed.

    The model is unchanged then.
    """
    folder = adapter_folder(path, [TENSORS, CONFIG], "PEFT's save_pretrained")
    what = str(folder / CONFIG)
    options = check(parse_json(_read(folder / CONFIG), what), OPTIONS, what)
    format, names = format_of(options), Names(options.model_dump())
    try:
        handle = open_inside(folder, TENSORS)
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} holds no {TENSORS}{_pickled(folder)}") from None
    with handle:
        file = TensorFile(handle, str(folder / TENSORS))
        state = find_state(model)
        root = unwrapped(model) if state is None else state.model
        try:
            return _Reader(root, format, options, names, file, str(folder / TENSORS)).attach(name or "default", active)
        except UnsupportedError as error:
            raise UnsupportedError(f"{folder}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        handle = open_inside(path.parent, path.name)
    except FileNotFoundError:
        raise AdapterFileError(
            f"{path.parent} holds no {path.name}: give the folder that PEFT's save_pretrained wrote"
        ) from None
    with handle:
        size = os.fstat(handle.fileno()).st_size
        if size > _MAX_CONFIG:
            raise AdapterFileError(f"{path} has {size:,} bytes, more than any configuration of an adapter")
        return bytes(read_exactly(handle, size, str(path)))


def _pickled(folder: Path) -> str:
    if not (folder / "adapter_model.bin").exists():
        return ""
    return (
        ", but adapter_model.bin: a pickle, which can run any code when it is opened. Where you trust it, convert it: "
        "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')"
    )


class _Reader:
    """Sorts the tensors of a file by layer, checks that they are what the configuration names, and attaches them."""

    def __init__(self, model: nn.Module, format: Format, options: Any, names: Names, file: TensorFile, what: str):
        self.model, self.format, self.options, self.names = model, format, options, names
        self.file, self.what = file, what
        self.keys: dict[tuple[str, str], str] = {}  # (path of the layer, PEFT's name) -> name in the file
        self.shared: dict[str, list[str]] = {}  # PEFT's name -> names in the file: it may repeat what layers share
        self.whole: dict[str, str] = {}  # path of a tensor of the base, or of a module in full -> name in the file
        self.without_rank = format.without_rank(options)
        self._sort()

    def _sort(self) -> None:
        leaf = re.compile(
            rf"(?:(?P<path>.+)\.)?(?P<leaf>{'|'.join((*self.format.leaves, *self.format.shared))})"
            r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<rest>\.weight|\.bias)?"
        )
        adapters = set()
        for key in self.file.entries:
            short = next((key[len(prefix) :] for prefix in _PREFIXES if key.startswith(prefix)), key)
            if (found := leaf.fullmatch(short)) is None:
                saved = re.fullmatch(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)", short)
                self._put(self.whole, short if saved is None else f"{saved['path']}.{saved['rest']}", key)
                adapters |= set() if saved is None else {saved["adapter"]}
                continue
            if found["rest"] == ".bias":
                raise UnsupportedError(f"{key!r}: a LoRA's factors have no bias here (PEFT's lora_bias)")
            adapters |= {found["adapter"]} - {None}
            if found["path"] in self.without_rank and self.file.entries[key].numel == 0:
                continue
            if found["leaf"] in self.format.shared:
                self.shared.setdefault(found["leaf"], []).append(key)
            else:
                self._put(self.keys, (found["path"] or "", found["leaf"]), key)
        if len(adapters) > 1:
            raise AdapterFileError(
                f"{self.what} holds several adapters ({', '.join(sorted(adapters))}): save them one by one"
            )

    def _put(self, where: dict[Any, str], place: Any, key: str) -> None:
        if place in where:
            raise AdapterFileError(f"{self.what} holds both {where[place]!r} and {key!r}, which are the same tensor")
        where[place] = key

    def attach(self, name: str, active: bool) -> Adapter:
        matched = self._match()
        sites = [target.site for target in matched.values()]
        copies = self._copies()
        self._check_rest(copies)
        shapes = {leaf: self.file.entries[key].shape for (_, leaf), key in self.keys.items()}
        self.options = self.format.as_stored(self.options, shapes)
        method, methods = self.format.methods(self.options, self.names, sites)
        for site in sites:
            if reason := self.format.refusal(site):
                raise UnsupportedError(f"{site.name}: {reason}")
        needed = sum(site.count * methods[site.name].count(site) for site in sites)
        if needed > sum(entry.numel for entry in self.file.entries.values()):
            raise AdapterFileError(
                f"{self.what} holds fewer numbers than the {needed:,} that {method!r} needs on these layers"
            )
        paths = {target.site.name: path for path, target in matched.items()}

        def fill(adapter: Adapter) -> None:
            self._fill(adapter, paths)

        return build_adapter(
            self.model,
            list(matched.values()),
            method,
            methods,
            name,
            fill,
            init=None,
            seed=getattr(self.options, "projection_prng_key", 0),
            targets=list(paths),
            copies=copies,
            active=active,
        )

    # ---- which layers

    def _match(self) -> dict[str, Target]:
        """The site of each path in the file, in the model's order; the configuration must name the same ones."""
        there = {path for path, _ in self.keys}
        if not there:
            raise AdapterFileError(f"{self.what} holds no tensor of a {self.format.peft_type} adapter")
        matched: dict[str, Target] = {}
        linear = []
        for path, layer in self.model.named_modules():
            mixin = kind_of(layer) if path and not inside_adapter(path) else None
            if mixin in (AdaptedLinear, AdaptedConv1D):
                linear.append(path)
            if mixin is AdaptedExperts:
                matched |= self._experts(path, layer, there)
            elif mixin is not None and path in there:
                named = self.names.selects(path, linear=mixin in (AdaptedLinear, AdaptedConv1D))
                if not named and not (mixin is AdaptedLinear and self.names.selects_parameter(f"{path}.weight")):
                    raise AdapterFileError(f"{self.what} adapts {path}, which the configuration does not name")
                for site in mixin.sites(path, layer):
                    matched[path] = Target(site, mixin, path, layer)
        if stray := sorted(there - matched.keys()):
            raise AdapterFileError(self._no_place(stray[0]))
        if missing := self.names.missing(self.model, linear, there | self.without_rank):
            raise AdapterFileError(
                f"{self.what} holds nothing for {missing[0]}, which the configuration names ({len(missing)} such)"
            )
        return matched

    def _experts(self, path: str, layer: Any, there: set[str]) -> dict[str, Target]:
        """The weights of one experts module: in the file, the later one is wrapped around the earlier."""
        sites = [site for site in AdaptedExperts.sites(path, layer) if self.names.selects_parameter(site.name)]
        wrapped = [path + ".base_layer" * depth for depth in range(len(layer._parameters))]
        wrapped = [each for each in wrapped if each in there]
        if len(sites) != len(wrapped):
            raise AdapterFileError(
                f"{self.what} adapts {len(wrapped)} weights of {path}, and the configuration's target_parameters name "
                f"{len(sites)}"
            )
        pairs = zip(reversed(wrapped), sites, strict=True)
        return {each: Target(site, AdaptedExperts, path, layer) for each, site in pairs}

    def _no_place(self, path: str) -> str:
        found = submodule(self.model, path)
        why = "there is no such module" if found is None else f"no delta can sit on a {type(found).__name__}"
        base = self.options.base_model_name_or_path
        made_for = f"; the adapter was made for {base!r}" if base else ""
        return f"{self.what} adapts {path[:200]!r} and in this {type(self.model).__name__} {why}{made_for}"

    def _copies(self) -> dict[str, nn.Module]:
        """The modules that the file holds in full."""
        copies = {}
        for path, module in self.model.named_modules():
            inside = inside_adapter(path) or any(path.startswith(f"{outer}.") for outer in copies)
            if self.names.saves(path) and not inside:
                copies[path] = module
        return copies

    def _check_rest(self, copies: Mapping[str, nn.Module]) -> None:
        """PEFT also stores weights of the base: all of an adapted embedding, and embeddings that were resized."""
        base: dict[str, Tensor] | None = None
        for path, key in self.whole.items():
            if any(path.startswith(f"{module}.") for module in copies):
                continue
            own = path.replace(".base_layer.", ".")
            base = dict(self.model.named_parameters(remove_duplicate=False)) if base is None else base
            if own not in base:
                raise AdapterFileError(
                    f"{self.what} holds {key[:200]!r}, which is neither of the adapter nor of this "
                    f"{type(self.model).__name__}"
                )
            entry: Entry = self.file.entries[key]
            if entry.shape != tuple(base[own].shape) or not torch.equal(self._tensors()[key].to(base[own]), base[own]):
                raise UnsupportedError(
                    f"the file holds {own} with other values or another shape than this model's: the base was resized "
                    "or trained along. Load that weight into the model first, or save the adapter with the module in "
                    "modules_to_save"
                )

    # ---- what is in them

    def _tensors(self) -> dict[str, Tensor]:
        if not hasattr(self, "_read"):
            self._read = self.file.tensors()
            check_finite(self._read, self.what, AdapterFileError)
        return self._read

    @torch.no_grad()
    def _fill(self, adapter: Adapter, paths: Mapping[str, str]) -> None:
        state, used, tensors = {}, set(), self._tensors()

        def take(key: str | None, called: str, shape: torch.Size) -> Tensor:
            if key is None:
                raise AdapterFileError(f"{self.what} lacks {called}")
            used.add(key)
            if tensors[key].shape != shape or not tensors[key].is_floating_point():
                raise AdapterFileError(
                    f"{self.what}: {key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(shape)}"
                )
            return tensors[key]

        for delta in adapter.deltas.values():
            path = paths[delta.site.name]
            for own, mine in delta.named_parameters(recurse=False):
                leaf = self.format.leaf(own, delta.site).removesuffix(".weight")
                shape = self.format.to_peft(own, mine.to("meta"), delta).shape
                tensor = take(self.keys.get((path, leaf)), f"{path}.{leaf}", shape)
                state[f"deltas.{delta.site.name}.{own}"] = self.format.from_peft(own, tensor, mine, delta)
        for path, copied in adapter.modules.items():
            for key, mine in copied.module.state_dict().items():
                state[f"modules.{path}.{key}"] = take(self.whole.get(f"{path}.{key}"), f"{path}.{key}", mine.shape)
        if getattr(self.options, "save_projection", True):
            if missing := self.format.shared.keys() - self.shared.keys():
                raise AdapterFileError(
                    f"{self.what} lacks {sorted(missing)[0]}, and the configuration says save_projection"
                )
            for first, *others in self.shared.values():
                if different := [key for key in others if not torch.equal(tensors[key], tensors[first])]:
                    raise AdapterFileError(
                        f"{self.what}: {different[0]!r} differs from {first!r}, and all layers share one"
                    )
                used |= {first, *others}
        self.format.take_shared(adapter, self.options, {leaf: tensors[keys[0]] for leaf, keys in self.shared.items()})
        state |= {name: tensor for name, tensor in adapter.named_tensors() if name.startswith("shared.")}
        if unused := {*self.keys.values(), *chain(*self.shared.values())} - used:
            raise AdapterFileError(
                f"{self.what} holds {sorted(unused)[0]!r}, which {adapter.method.slug} has no place for on that layer"
            )
        adapter.load_state_dict(state)
