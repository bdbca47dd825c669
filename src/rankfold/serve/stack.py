"""A causal language model layer by layer, and what its layers keep of a sequence that comes in windows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rankfold.errors import UnsupportedError

Step = Callable[..., Any]  # of a layer's number, its input and its other arguments: the layer's output


class Stack:
    """A causal language model of Transformers as layers one after the other, a stem below and a head above them.

    Args:
        model: with its adapters; they may come and go.
        attention: the implementation (`"sdpa"`, `"eager"`) that windows run with; None: the model's own.

    Raises:
        UnsupportedError: it is not built so, which one token shows: a layer's input is not the output of the one
            before, or a layer keeps something else of a sequence than its own keys and values.
    """

    def __init__(self, model: Any, attention: str | None = None):
        self.model, self.decoder = model, model.get_decoder()
        self.attention = attention or model.config._attn_implementation
        self.device = model.get_input_embeddings().weight.device
        count = model.config.get_text_config().num_hidden_layers
        lists = [m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not lists:
            raise UnsupportedError(
                f"{type(model).__name__} has no list of {count} layers that windows could go through"
            )
        self.layers: list[nn.Module] = list(lists[0])
        self.tuples = False  # whether a layer gives its output as the first of several
        self._try_out()

    def _try_out(self) -> None:
        cache, given = Kept(len(self.layers), 1), list[Any]()

        def step(i: int, x: Tensor, *args: Any, **named: Any) -> Any:
            y = self.own[i](x, *args, **named)
            self.tuples = isinstance(y, tuple)
            given.append((x, y[0] if self.tuples else y))
            return y

        refusal = f"{type(self.model).__name__} cannot be trained in windows of tokens: "
        try:
            with torch.no_grad():
                self.run(self.decoder, torch.zeros(1, 1, dtype=torch.long, device=self.device), cache, step)
        except Exception as error:  # it takes other arguments, or its layers keep something that is no key or value
            raise UnsupportedError(f"{refusal}{type(error).__name__}: {error}") from error
        chained = all(given[i + 1][0] is given[i][1] for i in range(len(given) - 1))
        if len(given) != len(self.layers) or not chained or not all(layer.fresh for layer in cache.layers):
            raise UnsupportedError(
                f"{refusal}a layer of it sees more than the output of the layer before and its own keys and values"
            )

    def run(self, whole: nn.Module, ids: Tensor, cache: "Kept", step: Step) -> Any:
        """The decoder or the model over ids (1, n), which follow what is in the cache, with `step` for its layers."""
        before = self.model.config._attn_implementation
        positions = torch.arange(cache.start, cache.start + ids.shape[1], device=ids.device)[None]
        try:
            if before != self.attention:
                self.model.set_attn_implementation(self.attention)
            with self.stepping(step):
                return whole(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        finally:
            if before != self.attention:
                self.model.set_attn_implementation(before)

    @contextmanager
    def stepping(self, step: Step) -> Iterator[None]:
        """Have forwards of the model call `step` for its layers, which are themselves in `own`."""
        self.own: list[Step] = [layer.forward for layer in self.layers]
        patched = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for i, layer in enumerate(self.layers):
                layer.__dict__["forward"] = lambda *args, i=i, **named: step(
                    i, *(args or (named.pop("hidden_states"),)), **named
                )
            yield
        finally:
            for layer, forward in zip(self.layers, patched, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward


class _Layer(DynamicLayer):
    """One layer's keys and values (1, heads, T, c), `K` and `V`, and of later windows' loss their gradients.

    With gradients on, those of earlier tokens are leaves, whose gradients `consume` adds up in `dK` and `dV`.
    """

    def __init__(self, cache: "Kept"):
        super().__init__()
        self.cache = cache
        self.KV: list[Tensor] = []
        self.dKV: list[Tensor] = []
        self.fresh: list[Tensor] = []  # of the window
        self.earlier: list[Tensor] = []

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.start + query_length, 0

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Put the keys and values of the next tokens behind those that are there."""
        if not self.KV:
            self.KV = [t.new_empty(*t.shape[:2], self.cache.length, t.shape[3]) for t in (key, value)]
        for kept, new in zip(self.KV, (key, value), strict=True):
            kept[:, :, self.cache.start : self.cache.start + new.shape[2]] = new

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, stop = self.cache.start, self.cache.start + key_states.shape[2]
        self.fresh = [key_states, value_states]
        if not torch.is_grad_enabled():
            self.keep(key_states, value_states)
            key, value = (kept[:, :, :stop] for kept in self.KV)
        else:
            self.earlier = [kept[:, :, :start].detach().requires_grad_() for kept in self.KV]
            key, value = (torch.cat(both, 2) for both in zip(self.earlier, self.fresh, strict=True))
        return key, value

    def backward(self, y: Tensor, dy: Tensor) -> None:
        """The backward pass of a window whose output is y, with what later windows said of its keys and values."""
        start, stop = self.cache.start, self.cache.start + y.shape[1]
        if not self.dKV:  # a sum over all later windows, so not in 16 bits
            self.dKV = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in self.KV]
        said = [grad[:, :, start:stop].to(own.dtype) for grad, own in zip(self.dKV, self.fresh, strict=True)]
        torch.autograd.backward([y, *self.fresh], [dy, *said])
        for grad, leaf in zip(self.dKV, self.earlier, strict=True):
            if leaf.grad is not None:
                grad[:, :, :start] += leaf.grad
        self.fresh, self.earlier = [], []


class Kept(Cache):
    """What the layers keep of a sequence of `length` tokens, `start` of which came before the window."""

    layers: list[_Layer]

    def __init__(self, layers: int, length: int):
        self.length, self.start = length, 0
        super().__init__(layers=[_Layer(self) for _ in range(layers)])
