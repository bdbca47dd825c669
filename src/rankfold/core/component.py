"""Components: every published technique is a small validated value with a slug, found and built by that slug."""

import difflib
import functools
import importlib
import pkgutil
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

import rankfold
from rankfold.errors import RankfoldError

_NOT_AXES = {"audit", "cli", "compare", "core", "serve", "train"}
_registry: dict[str, type["Component"]] = {}


class Component(BaseModel):
    """Hyperparameters of one technique: immutable, validated, serialisable (`describe`), registered by its `slug`.

    A subclass that states a `slug` is registered when it is defined, so a method in a user's own file is as good as
    one of ours once that file is imported. `title` and `source` name the paper; `axis` is the folder it lives in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    slug: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    axis: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "slug" not in cls.__dict__:
            return
        missing = [name for name in ("title", "source") if not hasattr(cls, name)]
        if missing:
            raise TypeError(
                f"{cls.__name__} has a slug but no {' and no '.join(missing)}: state them as class variables"
            )
        other = _registry.get(cls.slug)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"slug {cls.slug!r} of {cls.__module__}.{cls.__qualname__} is taken by {other.__module__}")
        package, _, rest = cls.__module__.partition(".")
        if package == "rankfold" and rest.split(".")[0] not in _NOT_AXES:
            cls.axis = rest.split(".")[0]
        _registry[cls.slug] = cls

    def describe(self) -> dict[str, Any]:
        """The component as plain JSON values: `{"name": slug, hyperparameter: value, ...}`; `build` reads it back."""
        return {"name": self.slug, **self.model_dump(mode="json")}


@functools.cache
def discover() -> None:
    """Import every file of every axis folder, so that the registry is complete."""
    for axis in pkgutil.iter_modules(rankfold.__path__):
        if not axis.ispkg or axis.name in _NOT_AXES:
            continue
        package = importlib.import_module(f"rankfold.{axis.name}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"rankfold.{axis.name}.{module.name}")


def components() -> list[type[Component]]:
    """Every registered component class, by axis and slug."""
    discover()
    return sorted(_registry.values(), key=lambda cls: (cls.axis, cls.slug))


def component(slug: str) -> type[Component]:
    """The class registered under `slug`. Raises RankfoldError with near matches and the whole list for a wrong one."""
    discover()
    if slug in _registry:
        return _registry[slug]
    near = difflib.get_close_matches(str(slug), _registry, n=3)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise RankfoldError(f"no component is called {slug!r}{hint} There are: {', '.join(sorted(_registry))}")


def build(slug: str, /, **hyperparameters: Any) -> Any:
    """Build any registered component by its slug, as recipes and checkpoints do: `build("lora", rank=8)`.

    Raises RankfoldError for an unknown slug, an unknown hyperparameter or a value out of range; the message names
    the hyperparameter and lists those there are.
    """
    cls = component(slug)
    try:
        return cls(**hyperparameters)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or slug}: {e['msg']}" for e in error.errors())
        defaults = {name: "" if f.is_required() else f"={f.default!r}" for name, f in cls.model_fields.items()}
        known = ", ".join(name + default for name, default in defaults.items()) or "none"
        raise RankfoldError(f"{slug}: {problems} (hyperparameters of {slug}: {known})") from None
