"""Networks whose output is an adapter: what they have in common, and their files.

A generator is a folder with `generator.safetensors` (the tensors, and the document in their metadata, so that one file
is the whole) and `generator.json` (the document once more, for people). Everything read is checked before it is used.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

import rankfold
from rankfold.compose._flat import Pairs
from rankfold.core import fingerprint
from rankfold.core.adapter import Adapter, check_finite, check_layout
from rankfold.core.attach import attach
from rankfold.core.checkpoint import _check_base, _component
from rankfold.core.component import Component
from rankfold.core.document import Base, Described, SiteRecord, as_text
from rankfold.core.files import adapter_folder, open_inside, parse_json, write_whole
from rankfold.core.targets import inside_adapter, site_at
from rankfold.core.tensorfile import TensorFile, apart, digest
from rankfold.errors import AdapterFileError, RankfoldError

FORMAT = 1
TENSORS, DOCUMENT = "generator.safetensors", "generator.json"
MAX_SITES = 20_000


class About(BaseModel):
    """What a generator is, but for its numbers: what it was built from, for which layers of which base.

    `sites` say the LoRA that each layer gets; `width` is that of the base's hidden states; `tasks` are those that a
    generator was trained on by name.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    generator: Described
    sites: Annotated[dict[str, SiteRecord], Field(min_length=1, max_length=MAX_SITES)]
    base: Base
    width: Annotated[int, Field(ge=1, lt=1 << 20)]
    tasks: list[str]

    @classmethod
    def of(cls, config: Component, model: Any, methods: Mapping[str, Component], tasks: list[str]) -> "About":
        """Of layers of the model at hand, with `methods` the LoRA of each."""
        found = {name: site_at(model, name) for name in methods}
        if missing := [name for name, target in found.items() if target is None or target.site.batch]:
            raise RankfoldError(
                f"{config.slug} adapts single matrices, and this {type(model).__name__} has none at {missing[0]}: load "
                "the model that it is for"
            )
        sites = [target.site for target in found.values() if target is not None]
        records = {
            site.name: SiteRecord(
                kind=site.kind, shape=[site.out, site.in_], dtype="float32", method=methods[site.name].describe()
            )
            for site in sites
        }
        base = Base.model_validate(fingerprint.fingerprint(model, sites, {}))
        return cls(generator=config.describe(), sites=records, base=base, width=hidden_width(model), tasks=tasks)


class Document(About):
    format: int
    rankfold: str
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sha256: str


class Generator(nn.Module):
    """A network that is built from its component and what `about` says, on the meta device too."""

    config_type: ClassVar[type[Component]]

    def __init__(self, config: Any, about: About):
        super().__init__()
        self.config, self.about = config, about

    @property
    def base(self) -> Base:
        """The model it was trained for."""
        return self.about.base

    def start(self, seed: int) -> "Generator":
        """Draw the parameters."""
        raise NotImplementedError

    def products(self, model: Any, tokenizer: Any, text: str, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """B and A of each site for what the text says, where `x ↦ scale · B A x` is the change."""
        raise NotImplementedError


def generate(
    generator: Generator, model: nn.Module, tokenizer: Any, text: str, name: str = "generated", *,
    strict: bool = True, **options: Any,
) -> Adapter:  # fmt: skip
    """The adapter that the generator makes of a text, as a LoRA on the model, active.

    Args:
        generator: what `load_generator` gave, or a trained one.
        model: the base that it was trained for, without an active adapter.
        tokenizer: the model's.
        text: the context that the model shall know (generative-adapter), or examples of a task with an empty line
            between them (icm-lora).
        name: of the new adapter.
        strict: refuse a base whose weights are another model's; with False, warn.
        options: of the generator: `seed` and `task` for icm-lora.
    """
    check_base(generator, model, strict)
    return attach_products(generator, model, generator.products(model, tokenizer, text, **options), name)


def attach_products(generator: Generator, model: nn.Module, pairs: Pairs, name: str) -> Adapter:
    """A new LoRA on the model with these factors."""
    methods = {site: lora_of(record, site, site) for site, record in generator.about.sites.items()}
    widest = max(methods.values(), key=lambda method: method.rank)
    own = {site: method.model_dump() for site, method in methods.items() if method != widest}
    adapter = attach(model, widest, lambda path, _: path in methods, name, overrides=own)
    for site, (B, A) in pairs.items():
        adapter.deltas[site].set_start(B, A)
    return adapter


def check_base(generator: Generator, model: nn.Module, strict: bool = True) -> None:
    """Raise AdapterFileError where the model lacks the generator's layers, or has another model's weights."""
    what, sites = "the generator", []
    for name, record in generator.about.sites.items():
        target = site_at(model, name)
        if target is None or [target.site.out, target.site.in_] != record.shape:
            raise AdapterFileError(
                f"{what} makes adapters for {name!r} ({'×'.join(map(str, record.shape))}) of {generator.base}, and "
                f"this {type(model).__name__} has no such layer: load the model it was trained for"
            )
        sites.append(target.site)
    _check_base(model, generator.about, sites, {}, strict, what)  # type: ignore[arg-type]  # it reads the base alone


def hidden_width(model: Any) -> int:
    """The width of the model's hidden states."""
    return int(model.get_input_embeddings().weight.shape[1])


# ---- files


def save_generator(generator: Generator, path: str | Path) -> Path:
    """Write a generator into the folder `path`; each file is written whole or not at all."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise RankfoldError(f"{path} is a file; a generator is saved into a folder")
    tensors = apart({name: tensor.detach() for name, tensor in generator.state_dict().items()})
    check_finite(tensors, "the generator is not saved")
    about = generator.about.model_dump(mode="json", by_alias=True)
    head = {"format": FORMAT, "rankfold": rankfold.__version__, "id": secrets.token_hex(16)}
    text = as_text({**head, **about, "sha256": digest(tensors)})

    def whole(file: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt", "rankfold": text})

    write_whole(path / TENSORS, whole)
    write_whole(path / DOCUMENT, text)
    return path


def load_generator(path: str | Path) -> Generator:
    """A saved generator, in eval mode. Raises AdapterFileError for files that are missing, damaged or hostile."""
    folder = adapter_folder(path, [TENSORS, DOCUMENT], "`rankfold train-generator`")
    what = str(folder / TENSORS)
    try:
        handle = open_inside(folder, TENSORS)
    except FileNotFoundError:
        inner = folder / "generator"
        hint = f": give {inner}" if inner.is_dir() else ": give the folder that `rankfold train-generator` wrote"
        raise AdapterFileError(f"{folder} holds no {TENSORS}{hint}") from None
    with handle:
        file = TensorFile(handle, what)
        document = _document(file, what)
        config = _component(document.generator, Component, what)
        if not hasattr(config, "network"):
            raise AdapterFileError(f"{what}: {config.slug!r} generates no adapters: the file is damaged")
        try:
            with torch.device("meta"):  # what the document asks for takes no memory before the tensors fit it
                generator = config.network(document)
        except (RankfoldError, ArithmeticError, RuntimeError, ValueError) as error:
            raise AdapterFileError(f"{what}: the network that it describes cannot be made: {error}") from error
        check_layout(generator.state_dict(), file.entries, what, AdapterFileError)
        tensors = file.tensors()
        if file.digest() != document.sha256:
            raise AdapterFileError(f"{what}: the tensors are not those that were saved: fetch or save it again")
        generator.load_state_dict(tensors, assign=True)
    return generator.eval()


def _document(file: TensorFile, what: str) -> Document:
    if "rankfold" not in file.metadata:
        raise AdapterFileError(f"{what} is a safetensors file, but no generator of Rankfold: it holds no document")
    parsed = parse_json(file.metadata["rankfold"].encode(errors="surrogatepass"), f"{what}: the document")
    version = parsed.get("format") if isinstance(parsed, dict) else None
    if version != FORMAT:
        raise AdapterFileError(f"{what}: its format is {str(version)[:40]!r}, and this Rankfold reads {FORMAT}")
    try:
        document = Document.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))[:200]
        raise AdapterFileError(f"{what}: {at!r}: {first['msg']}; it is damaged or was edited") from None
    for site, record in document.sites.items():
        if not site.isprintable() or not all(site.split(".")) or inside_adapter(site) or len(site) > 1000:
            raise AdapterFileError(f"{what}: {site[:200]!r} is no path of a layer: the file is damaged or hostile")
        if len(record.shape) != 2:
            raise AdapterFileError(f"{what}: {site} has no shape (out, in): the file is damaged")
        lora_of(record, site, what)
    return document


def lora_of(record: SiteRecord, site: str, what: str) -> Any:
    """The LoRA that a generator's site gets, checked. `what` is the file that says it."""
    from rankfold.deltas.lora import LoRA

    method = _component(record.method, LoRA, f"{what}: {site}")
    if method.rank > min(record.shape):
        raise AdapterFileError(f"{what}: a LoRA of rank {method.rank} does not fit {site}: the file is damaged")
    return method
