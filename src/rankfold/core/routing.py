"""Which adapter a forward uses: the state one adapted model shares with all its adapted layers."""

import copy
import operator
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.quantized import repack_again, without_repacking
from rankfold.errors import RankfoldError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+=@-]{0,127}")

_version = operator.attrgetter("_version")


class Rows:
    """One adapter name (or None) for each of the R rows of a batch."""

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.distinct = tuple(dict.fromkeys(self.names))
        self.index = torch.tensor([self.distinct.index(name) for name in self.names])
        groups = [[row for row, name in enumerate(self.names) if name == one] for one in self.distinct]
        self.groups = [torch.tensor(group) for group in groups]
        self.order = torch.argsort(torch.cat(self.groups))  # from groups one after the other back to the batch
        self._stacks: dict[Any, tuple[list[Any], list[Tensor], int, tuple[Tensor, Tensor]] | None] = {}

    def repeat(self, x: Tensor, where: str) -> int:
        """How many entries of x's first dimension each row has."""
        repeat = x.shape[0] // len(self.names)
        if not repeat or x.shape[0] % len(self.names):
            raise RankfoldError(
                f"{len(self.names)} adapter names were given, one for each row, but {where} got an input of shape "
                f"{tuple(x.shape)}: its first dimension must be a multiple of {len(self.names)}"
            )
        return repeat

    def apart(
        self, one: Callable[..., Tensor], choices: Sequence[Any], where: str, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`one(choice, *args)` for the rows of each distinct adapter, put together again in the batch's order.

        Arguments with as many rows as the first are cut to the group's rows; others go to every group whole.
        """
        repeat, device = self.repeat(args[0], where), args[0].device

        def spread(rows: Tensor) -> Tensor:
            rows = rows.to(device)
            return rows if repeat == 1 else (rows[:, None] * repeat + torch.arange(repeat, device=device)).flatten()

        def cut(value: Any, group: Tensor) -> Any:
            return value[group] if isinstance(value, Tensor) and value.shape[:1] == args[0].shape[:1] else value

        parts = [
            one(choice, *(cut(v, group) for v in args), **{k: cut(v, group) for k, v in kwargs.items()})
            for group, choice in zip(map(spread, self.groups), choices, strict=True)
        ]
        return torch.cat(parts)[spread(self.order)]

    def kept(self, layer: Any, deltas: list[Any]) -> tuple[Tensor, Tensor] | None:
        """What `keep` kept for the layer, if no gradient is recorded and nothing that it was made from has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (kept := self._stacks.get(layer)) is None:
            return None
        made_from, tensors, versions, stack = kept
        if made_from != deltas or sum(map(_version, tensors)) != versions:
            return None
        changing = (d for d in deltas if d is not None)  # in ways that no version tells of
        return None if any((d.dropout and d.training) or d.plan is not None or d.strength for d in changing) else stack

    def keep(self, layer: Any, deltas: list[Any], A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A, B, the stacked factors of the rows, kept from the second forward under this route on."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return A, B
        if layer not in self._stacks:  # a route that is used once shall not pay for the check of later ones
            self._stacks[layer] = None
        else:
            tensors = [t for d in deltas if d is not None for t in d.parameters()]
            planned = any(d is not None and (d.plan is not None or d.strength) for d in deltas)
            if not planned and not any(t.is_inference() for t in tensors):
                # A version only ever grows, so their sum tells whether any did.
                self._stacks[layer] = deltas, tensors, sum(map(_version, tensors)), (A, B)
        return A, B

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rows":
        return Rows(self.names)


Route = str | Rows | None


class State:
    """The adapters of one model and the route its forwards take.

    `route` is plain state that every adapted layer reads: None (the base), a name, or `Rows`. It is written under
    `lock`, which a forward of the whole model also takes, so that one thread's choice never reaches another thread's
    forward. Compiled forwards skip the lock (a lock cannot be traced): several threads that share one compiled model
    must each call it inside `using`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Any] = {}
        self.active: str | None = None
        self.route: Route = None
        self.last: Rows | None = None
        self.tags: Tensor | int | None = None
        self.merged: tuple[str, ...] = ()
        self.lock = threading.RLock()
        self.originals: dict[str, Any] = {}
        self.untied = False
        self.trainable: set[str] = set()
        self._repacking = without_repacking(model)
        self._hooks = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.lock.acquire()
            if torch.is_grad_enabled():  # a training step, whose optimiser may write past `_version`
                self.last = None

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.lock.release()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        repack_again(self._repacking)

    def check(self, name: str) -> str:
        if name not in self.adapters:
            there = ", ".join(map(repr, self.adapters)) or "none"
            raise RankfoldError(f"no adapter is called {name!r}; attached are: {there}")
        return name

    def resolve(self, choice: str | Sequence[str | None] | None) -> Route:
        """The route of a choice; a merged adapter is in the base already, so it counts as None."""
        if choice is None or isinstance(choice, str):
            return None if choice is None or self.check(choice) in self.merged else choice
        names = [None if name is None or self.check(name) in self.merged else name for name in choice]
        if not names:
            raise RankfoldError("an empty list of adapter names: give one name (or None) for each row of the batch")
        if len(set(names)) == 1:
            return names[0]
        if self.last is None or self.last.names != tuple(names):  # a server's next batch often has the same tenants
            self.last = Rows(names)
        return self.last

    def activate(self, name: str | None) -> None:
        with self.lock:
            self.route = self.resolve(name)
            self.active = name

    @contextmanager
    def using(self, choice: str | Sequence[str | None] | None) -> Iterator[None]:
        with self.lock:
            before, self.route = self.route, self.resolve(choice)
            try:
                yield
            finally:
                self.route = before

    @contextmanager
    def tagged(self, tags: Tensor | int | None) -> Iterator[None]:
        """Let the rows of a batch carry what deltas may go by: an integer (a class, a task) for all, or for each
        (rows,), or numbers for each (rows, width), a context.

        Under `lock`, as any change of what forwards do.
        """
        before, self.tags = self.tags, tags
        try:
            yield
        finally:
            self.tags = before

    def tags_of(self, x: Tensor) -> Tensor | int | None:
        """The tags as x's rows have them: a row of the batch may be several consecutive rows here."""
        if not isinstance(self.tags, Tensor):
            return self.tags
        repeat, rest = divmod(x.shape[0], self.tags.shape[0])
        if rest or not repeat:
            raise RankfoldError(
                f"{self.tags.shape[0]} classes or contexts were given, one a row, but a layer got an input of shape "
                f"{tuple(x.shape)}: its first dimension must be a multiple of that"
            )
        tags = self.tags.to(x.device)
        return tags if repeat == 1 else tags.repeat_interleave(repeat)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"} | {"last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        new = memo[id(self)] = State.__new__(State)
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


def check_new_name(name: str, state: State | None) -> None:
    """Refuse an adapter name that is malformed or taken."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RankfoldError(
            f"adapter name {name!r}: use 1 to 128 letters, digits or _ + = @ -, starting with a letter, digit or _"
        )
    if state is not None and name in state.adapters:
        raise RankfoldError(
            f"an adapter called {name!r} is attached already (attached are: {', '.join(state.adapters)}); "
            "choose another name or detach it"
        )


def state_of(model: nn.Module) -> State:
    """The adapters' state of a model, also through wrappers (`torch.compile`, DDP, Accelerate). Raises without one."""
    state = find_state(model)
    if state is None:
        raise RankfoldError(
            f"no adapter is attached to this {type(model).__name__}: call rankfold.attach or rankfold.load first"
        )
    return state


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and distributed wrappers, whose paths an adapter's sites are."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def find_state(model: nn.Module) -> State | None:
    """The adapters' state of a model or of what it wraps; None if no adapter was ever attached."""
    return unwrapped(model).__dict__.get("_rankfold_state")
