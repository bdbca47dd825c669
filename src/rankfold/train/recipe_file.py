"""Recipes in YAML: reading, `--set` overrides, and errors that name the key in dotted form."""

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from rankfold.errors import RankfoldError
from rankfold.train.recipe import Recipe

Part = TypeVar("Part", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-3` is a number (PyYAML reads it as text) and a key given twice is
    refused (PyYAML keeps the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise RankfoldError(f"line {key_node.start_mark.line + 1}: the key {key_node.value!r} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value `text` holds. Raises RankfoldError with line and column; `where` is what the message calls it."""
    try:
        return yaml.load(text, _Loader)
    except RankfoldError as error:
        raise RankfoldError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RankfoldError(f"{where} is not YAML{place}: {getattr(error, 'problem', error)}") from None


@overload
def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...


@overload
def read_recipe(path: str | Path, overrides: Sequence[str] = (), *, schema: type[Part]) -> Part: ...


def read_recipe(path: str | Path, overrides: Sequence[str] = (), *, schema: type[Any] = Recipe) -> Any:
    """The recipe in the file `path`, with `key.sub=value` overrides applied; one for adapters unless `schema` differs.

    Raises RankfoldError, naming the key in dotted form and what is allowed there.
    """
    return validate_part(schema, read_values(path, schema, "recipe", overrides), str(path))


def read_values(path: str | Path, schema: type[BaseModel], what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the YAML file holds, with overrides applied, not yet validated; `what` is what messages call it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RankfoldError(f"cannot read the {what} {path}: {reason}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        keys = [name for name, field in schema.model_fields.items() if field.is_required()]
        raise RankfoldError(f"{path} holds no {what}: expected keys such as {', '.join(keys)}")
    for override in overrides:
        apply_override(values, override)
    return values


def validate(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """`values` as a Recipe; every problem in one RankfoldError."""
    return validate_part(Recipe, values, where)


def validate_part(schema: type[Part], values: dict[str, Any], where: str) -> Part:
    """`values` as one section of a recipe, with the same errors."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise RankfoldError(f"{where}: " + "; ".join(describe_errors(error, schema))) from None


def write_recipe(recipe: BaseModel) -> str:
    """The recipe as YAML, every default spelled out, in the order of the schema."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in nested `values`, in place; the value is YAML, a number in the key indexes a list."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RankfoldError(f"--set {override}: expected key.sub=value, as optimizer.lr=1e-3")
    value = parse_yaml(text, f"--set {override}")
    here: Any = values
    for depth, part in enumerate(parts[:-1]):
        here = _descend(here, part, ".".join(parts[: depth + 1]), override)
    _assign(here, parts[-1], value, override)


def _descend(here: Any, part: str, dotted: str, override: str) -> Any:
    if isinstance(here, list):
        index = _index(here, part, override)
        if isinstance(here[index], str):
            here[index] = {"name": here[index]}
        return here[index]
    below = here.get(part)
    if isinstance(below, str):  # a short form (`method: lora`, `model: PATH`) grows into the long one
        below = {"path" if dotted == "model" else "name": below}
    elif below is None:
        below = {}
    elif not isinstance(below, dict | list):
        raise RankfoldError(f"--set {override}: {dotted} holds {below!r}, which has no keys below it")
    here[part] = below
    return below


def _assign(here: Any, part: str, value: Any, override: str) -> None:
    if isinstance(here, list):
        here[_index(here, part, override)] = value
    else:
        here[part] = value


def _index(here: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(here):
        raise RankfoldError(f"--set {override}: {part!r} is no index of a list with {len(here)} entries")
    return int(part)


def describe_errors(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per problem: the key in dotted form, what is wrong, what is allowed.

    `prefix` is put before each key, for a value that sits inside a larger one.
    """
    lines = []
    for problem in error.errors():
        loc = [part for part in problem["loc"] if not _is_union_tag(part)]
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + loc)
        if problem["type"] == "extra_forbidden":
            allowed = list(_model_at(schema, loc[:-1]).model_fields)
            near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
            line = f"{key}: unknown key; {hint}"
        elif problem["type"] == "missing":
            line = f"{key}: required"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], dict | BaseModel) else f" (got {problem['input']!r})"
            line = f"{key}: {message[:1].lower()}{message[1:]}{shown}" if key else message
        lines.append(line)
    return list(dict.fromkeys(lines))


def _is_union_tag(part: Any) -> bool:
    """Pydantic names the branch of a union it tried (`targets.str`, `targets.tuple[str, ...]`): no key of a recipe."""
    return part == "str" or (isinstance(part, str) and part.startswith("tuple["))


def _model_at(schema: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The section that the key path `loc` leads to."""
    for part in loc:
        if isinstance(part, str) and part in schema.model_fields:
            schema = _model_in(schema.model_fields[part].annotation) or schema
    return schema


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return next((found for found in map(_model_in, typing.get_args(annotation)) if found), None)
    return None
