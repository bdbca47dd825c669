"""The document that says what an adapter's tensors are: made, written as JSON, and checked when it is read back."""

import base64
import json
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

import rankfold
from rankfold.core import fingerprint
from rankfold.core.adapter import Adapter
from rankfold.core.coded import Encoding
from rankfold.core.files import MAX_JSON, open_inside, parse_json
from rankfold.core.routing import NAME
from rankfold.core.targets import inside_adapter
from rankfold.core.tensorfile import TensorFile, digest
from rankfold.errors import AdapterFileError

FORMAT = 1
_DEFLATED = "deflate:"  # before a document in the metadata of a compressed adapter
TENSORS, DOCUMENT = "adapter.safetensors", "adapter.json"

Described = dict[str, JsonValue]
_Size = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class SiteRecord(_Strict):
    """One adapted weight: kind, shape `[*experts, out, in]`, the delta's dtype, the hyperparameters of its own."""

    kind: str
    shape: Annotated[list[_Size], Field(min_length=2, max_length=3)]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    method: Described


class Base(_Strict):
    """The base model: see `fingerprint`."""

    class_: str = Field(alias="class")
    name_or_path: str
    parameters: int
    sample: Annotated[
        dict[str, Annotated[list[FiniteFloat], Field(max_length=fingerprint.VALUES)]], Field(max_length=64)
    ]

    def __str__(self) -> str:
        name = f" {self.name_or_path!r}" if self.name_or_path else ""
        return f"{self.class_[:80]!r}{name} of {self.parameters:,} parameters"


class Document(_Strict):
    """What `adapter.json` says. `sha256` is over the tensors; `fold` whether the offset was folded into the weights;
    `nested` the lowest rank that the products can be cut to, where they were trained to be; `forced` what spoke
    against making the adapter, where it was made all the same; `encoding` how tensors are stored, where not as they
    are: that is the file's own affair, and None in what `checkpoint` reads."""

    format: int
    rankfold: str
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    method: Described
    init: Described | None
    fold: bool
    targets: str | list[str] | None
    sites: dict[str, SiteRecord]
    modules: list[str]
    base: Base
    ported: Annotated[list[Base], Field(max_length=1000)] = []  # the bases it was on before this one, in order
    sha256: str
    nested: Annotated[int, Field(ge=1)] | None = None
    forced: Annotated[str, Field(max_length=2000)] | None = None
    encoding: Encoding | None = None


def describe(adapter: Adapter, tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> dict[str, Any]:
    common = adapter.method.describe()

    def own(site: str) -> dict[str, Any]:
        described = adapter.methods.get(site, adapter.method).describe()
        return {key: value for key, value in described.items() if value != common.get(key)}

    return {
        "format": FORMAT,
        "rankfold": rankfold.__version__,
        "id": secrets.token_hex(16),
        "name": adapter.name,
        "seed": adapter.seed,
        "method": common,
        "init": None if adapter.init is None else adapter.init.describe(),
        "fold": any(delta.is_folded for delta in adapter.deltas.values()),
        "targets": adapter.targets,
        "sites": {
            site.name: {
                "kind": site.kind,
                "shape": [*site.batch, site.out, site.in_],
                "dtype": str(site.dtype).removeprefix("torch."),
                "method": own(site.name),
            }
            for site in adapter.sites
        },
        "modules": list(adapter.modules),
        "base": fingerprint.fingerprint(adapter.model, adapter.sites, originals),
        "ported": [base.model_dump(by_alias=True) for base in adapter.ported],
        "sha256": digest(tensors),
        "nested": adapter.nested,
        "forced": adapter.forced,
    }


def as_text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each key and each site, for people and for diffs."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, value in document.items():
        if key == "sites":
            sites = ",\n".join(f"    {line(site)}: {line(record)}" for site, record in value.items())
            lines.append(f'  "sites": {{\n{sites}\n  }}')
        else:
            lines.append(f"  {line(key)}: {line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def deflated(text: str) -> str:
    """A document as the metadata of a small file hold it."""
    return _DEFLATED + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _embedded(text: str, what: str) -> bytes:
    if not text.startswith(_DEFLATED):
        return text.encode(errors="surrogatepass")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b85decode(text.removeprefix(_DEFLATED)), MAX_JSON)
    except (ValueError, zlib.error) as error:
        raise AdapterFileError(f"{what} cannot be inflated: {error}") from None
    if not stream.eof:
        raise AdapterFileError(f"{what} is cut short, or larger than {MAX_JSON:,} bytes")
    return data


def read_document(folder: Path, file: TensorFile) -> Document:
    what = f"{folder / TENSORS}: the embedded document"
    if "rankfold" not in file.metadata:
        raise AdapterFileError(
            f"{folder / TENSORS} is a safetensors file, but no adapter of Rankfold: its metadata holds no document"
        )
    embedded = _embedded(file.metadata["rankfold"], what)
    document = _check_document(embedded, what)
    beside = _read_beside(folder)
    if beside is None or beside == embedded:
        return document
    other = _check_document(beside, str(folder / DOCUMENT))
    if other.id == document.id and other != document:
        keys = [key for key in Document.model_fields if getattr(other, key) != getattr(document, key)]
        raise AdapterFileError(
            f"{folder / DOCUMENT} was changed after it was saved: it and its copy inside {TENSORS} have one id and "
            f"differ in {', '.join(keys)}. Delete {DOCUMENT} to load what was saved"
        )
    return document  # with another id, the save was cut off after the tensor file, which is whole, or goes on right now


def _read_beside(folder: Path) -> bytes | None:
    try:
        handle = open_inside(folder, DOCUMENT)
    except FileNotFoundError:
        return None
    with handle:
        data = b""
        while len(data) <= MAX_JSON and (part := handle.read(MAX_JSON + 1 - len(data))):
            data += part
    if len(data) > MAX_JSON:
        raise AdapterFileError(
            f"{folder / DOCUMENT} is larger than {MAX_JSON:,} bytes, more than an adapter's document"
        )
    return data


def _check_document(data: bytes, what: str) -> Document:
    parsed = parse_json(data, what)
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"{what} is no JSON object")
    version = parsed.get("format")
    if type(version) is not int:
        raise AdapterFileError(
            f"{what}: 'format' must be a whole number and is {str(version)[:40]!r}: it is no adapter's document"
        )
    if version != FORMAT:
        fix = "upgrade to read it" if version > FORMAT else "no such format was ever written, so the file is damaged"
        raise AdapterFileError(
            f"{what} has format {str(version)[:40]}, written by Rankfold {str(parsed.get('rankfold'))[:40]!r}; this is "
            f"{rankfold.__version__}, which reads format {FORMAT}: {fix}"
        )
    try:
        document = Document.model_validate(parsed)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))[:200]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise AdapterFileError(
            f"{what}: {at!r}: {first['msg']}{more}; it is damaged or was edited: save or fetch it again"
        ) from None
    for path in (*document.sites, *document.modules):
        if not path.isprintable() or not all(path.split(".")) or inside_adapter(path) or len(path) > 1000:
            raise AdapterFileError(f"{what}: {path[:200]!r} is no path of a layer: the file is damaged or hostile")
    in_full = set(document.modules)
    if len(in_full) != len(document.modules):
        raise AdapterFileError(f"{what}: a module is listed twice among the modules: the file is damaged")
    for path in (*document.sites, *document.modules):
        parts = path.split(".")
        above = {".".join(parts[:depth]) for depth in range(1, len(parts))} | (
            {path} if path in document.sites else set()
        )
        if clash := above & in_full:
            raise AdapterFileError(
                f"{what}: {min(clash)!r} is held in full and {path!r} in it also: the file is damaged or hostile"
            )
    if unknown := [site for site in document.base.sample if site not in document.sites]:
        raise AdapterFileError(
            f"{what}: the base is sampled at {unknown[0][:200]!r}, which is none of the sites: the file is damaged"
        )
    return document
