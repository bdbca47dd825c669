"""Which layers a PEFT configuration names, by PEFT's own rules, and how to name a given set of layers by them."""

import re
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rankfold.core.targets import all_linear
from rankfold.errors import AdapterFileError

ALL_LINEAR = "all-linear"
_MOST = 22  # how much freedom a pattern may have: six `.*` in a row take a second on a long path, ten take a day


class Names:
    """The names in a configuration: which modules and parameters they select, and which rank and alpha a layer has.

    A list holds whole paths or what follows a dot in them, a string is a regular expression for the whole path.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.targets: str | list[str] | None = config.get("target_modules")
        self.excluded: str | list[str] = config.get("exclude_modules") or []
        self.parameters: list[str] = config.get("target_parameters") or []
        self.saved: list[str] = config.get("modules_to_save") or []
        layers = config.get("layers_to_transform")
        self.layers = [layers] if isinstance(layers, int) else layers or []
        patterns = config.get("layers_pattern") or []
        self.layers_pattern = [patterns] if isinstance(patterns, str) else patterns
        self.ranks: dict[str, int] = config.get("rank_pattern") or {}
        self.alphas: dict[str, float] = config.get("alpha_pattern") or {}
        self.numbers: dict[str, int] = config.get("n_frequency_pattern") or {}
        regular = [text for text in (self.targets, self.excluded) if isinstance(text, str)]
        for pattern in (*regular, *self.layers_pattern, *self.ranks, *self.alphas, *self.numbers):
            check_pattern(pattern)

    def selects(self, path: str, linear: bool) -> bool:
        """Whether `target_modules` and its exceptions select the module at the path; `linear`: it is a linear layer."""
        if _listed(path, self.excluded) or any(
            re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in self.saved
        ):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            return linear
        if self.targets is None or not _listed(path, self.targets):
            return False
        if not self.layers or isinstance(self.targets, str) or path in self.targets:
            return True
        number = self._layer_number(path)
        return number is not None and number in self.layers

    def selects_parameter(self, path: str) -> bool:
        """Whether `target_parameters` selects the parameter at the path."""
        return _listed(path, self.parameters)

    def saves(self, path: str) -> bool:
        """Whether the module at the path is trained in full. A name needs no dot before it here."""
        return bool(path) and any(path.endswith(name) for name in self.saved)

    def rank(self, path: str, default: int) -> int:
        return _first_match(self.ranks, path, default)

    def alpha(self, path: str, default: float) -> float:
        return _first_match(self.alphas, path, default)

    def frequencies(self, path: str, default: int) -> int:
        """The number of frequencies: a pattern needs a dot before it, and what no pattern fits is a whole path."""
        found = (number for pattern, number in self.numbers.items() if re.match(rf".*\.{pattern}$", path))
        return next(found, self.numbers.get(path, default))

    def missing(self, model: Any, linear: Iterable[str], there: set[str]) -> list[str]:
        """Linear layers that the configuration selects and that are not `there`."""
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            linear = all_linear(model)  # PEFT's word leaves heads out by rules that differ in details
        return [path for path in linear if path not in there and self.selects(path, linear=True)]

    def _layer_number(self, path: str) -> int | None:
        """The first number in the path that follows a name, or one of the names in `layers_pattern`."""
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        else:
            found = next(
                filter(None, (re.match(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", path) for p in self.layers_pattern)), None
            )
        return None if found is None else int(found.group(found.lastindex or 1))


def _listed(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression, and one whose match could take forever (`(a+)+`)."""
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"{pattern[:80]!r} is no regular expression: {error}") from None
    if len(pattern) > 4096 or _freedom(tree) > _MOST:
        raise AdapterFileError(
            f"the regular expression {pattern[:80]!r} could take forever to match: give a list of names instead"
        )


def _freedom(tree: Any) -> int:
    """How freely a match can split a text: 3 for each repeat, 2 for each choice on the way; too freely if they nest."""
    total = 0
    for opcode, argument in tree:
        op = str(opcode)
        if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, body = argument
            if high == 1:
                total += _freedom(body) + 2 * (low != high)
            else:
                total += 3 * (low != high) + (_MOST + 1) * (_freedom(body) > 0)
        elif op == "BRANCH":
            total += 2 + max(map(_freedom, argument[1]))
        elif op in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total += _freedom(argument[-1])
        elif op == "ATOMIC_GROUP":
            total += _freedom(argument)
        elif op in ("GROUPREF", "GROUPREF_EXISTS"):
            total += _MOST + 1
    return total


def only(path: str) -> str:
    """A pattern that `rank_pattern` and `alpha_pattern` resolve for this path alone."""
    return f"^{re.escape(path)}"


def name_list(wanted: Sequence[str], everything: Iterable[str]) -> list[str]:
    """Names that select the wanted paths among everything: last parts where those do, else whole paths."""
    by_last: dict[str, set[str]] = {}
    for path in everything:
        by_last.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    there = set(wanted)
    short = {last for last, paths in by_last.items() if paths <= there}
    return list(dict.fromkeys(last if (last := path.rsplit(".", 1)[-1]) in short else path for path in wanted))


def name_pattern(wanted: Sequence[str]) -> str:
    """A regular expression that selects the wanted paths and nothing else."""
    return "|".join(map(re.escape, wanted))
