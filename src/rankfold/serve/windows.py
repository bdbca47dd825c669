"""Gradients of a sequence, a window of its tokens at a time. FlexLLM: Oliaro et al. 2024, arXiv 2402.18789."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.serve.stack import Kept, Stack
from rankfold.train.encode import IGNORED


class Windowed:
    """The loss of one sequence and an adapter's gradients, by windows of any sizes; the model is at no time occupied.

    `forward` goes through the tokens from the first to the last and keeps, without a graph, each layer's input X_l and
    its K_l, V_l. `backward` goes from the last window to the first and within it from the top layer down: layer l is
    computed again from X_l[w] with K_l, V_l of earlier tokens as leaves, then

        dX_l[w], dK_l[<w], dV_l[<w], dθ += ∂layer_l / ∂(X_l[w], K_l[<w], V_l[<w], θ)ᵀ (dX_{l+1}[w], dK_l[w], dV_l[w])

    where dK_l[w], dV_l[w] are what later windows added up. θ are the parameters that require gradients, those of the
    adapter that is active (or that `rankfold.using` says) around each call; their `.grad` adds up. The loss is the mean
    cross-entropy of the labelled tokens, each predicted from those before it, or their sum over `count`.

    Of T tokens in a model of L layers, width d and c numbers a key, it holds `(L + 1) T d + 4 L T c` numbers, the graph
    of one layer for one window, and the logits of one window. A window in which something was drawn (dropout) is gone
    back over as it was gone through, with the same draws, however few tokens `backward` is asked for.
    """

    def __init__(
        self, stack: Stack, input_ids: Tensor, labels: Tensor, count: float | None = None, seed: int | None = None
    ):
        """`input_ids` and `labels` are (T,), with IGNORED where there is no label; `seed` is that of what is drawn."""
        self.stack, self.ids = stack, input_ids.to(stack.device)[None]
        self.targets = F.pad(labels.to(stack.device)[1:], (0, 1), value=IGNORED)
        self.count = float((self.targets != IGNORED).sum()) if count is None else count
        self.length = self.ids.shape[1]
        self.cache = Kept(len(stack.layers), self.length)
        self.X: list[Tensor] = []
        self.done = 0  # tokens that went forward
        self.behind = 0  # of them, those that the backward pass is still to reach
        self.loss = 0.0
        self.alone = False  # whether its windows can go by themselves only
        # One draw a sequence, however it is cut.
        self._seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._drawn: list[int] = []  # first tokens of windows in which something was drawn

    # ---- forward

    def forward(self, n: int, score: bool = False) -> int:
        """Take the next n tokens through the model; returns how many there were. With `score` add to the loss."""
        start, stop = self.done, min(self.done + n, self.length)
        self.cache.start, drew = start, False
        layers = len(self.stack.layers)

        def step(i: int, x: Tensor, *args: Any, **named: Any) -> Any:
            nonlocal drew
            self._keep(i, x)
            with self._seeded(start, i) as drawn:
                y = self.stack.own[i](x, *args, **named)
                drew |= drawn()
            if i + 1 == layers:
                self._keep(layers, y[0] if isinstance(y, tuple) else y)
            return y

        whole = self.stack.model if score else self.stack.decoder
        with torch.no_grad():
            out = self.stack.run(whole, self.ids[:, start:stop], self.cache, step)
            if score:
                self.loss += float(self._loss(out.logits, start, stop))
        if drew:
            self.alone = True
            self._drawn.append(start)
        return self._went(stop - start)

    @contextmanager
    def beside(self, n: int) -> Iterator[None]:
        """Take the next n tokens through the model as the last rows of the forward of (rows, 1) tokens in this block.

        That forward sees to their keys and values itself (`guest.Beside`). Where it fails, or something was drawn
        in it, which could not be drawn again for them alone, they are as they were, and have to go `alone`.
        """
        self.cache.start, self.alone, top = self.done, True, len(self.stack.layers)

        def step(i: int, x: Tensor, *args: Any, **named: Any) -> Any:
            self._keep(i, x[-n:].transpose(0, 1))
            y = self.stack.own[i](x, *args, **named)
            if i + 1 == top:
                self._keep(top, (y[0] if isinstance(y, tuple) else y)[-n:].transpose(0, 1))
            return y

        with self._seeded(self.done, 0) as drawn:
            with self.stack.stepping(step):
                yield
            self.alone = drawn()
        if not self.alone:
            self._went(n)

    def _keep(self, i: int, x: Tensor) -> None:
        if i == len(self.X):
            self.X.append(x.new_empty(1, self.length, x.shape[2]))
        self.X[i][:, self.done : self.done + x.shape[1]] = x

    def _went(self, n: int) -> int:
        self.done += n
        self.behind = self.done
        return n

    # ---- backward

    def backward(self, n: int) -> int:
        """Take the gradients of the last n tokens that have none yet; returns how many tokens that were."""
        stop, stack = self.behind, self.stack
        start = self._drawn.pop() if self._drawn else max(0, stop - n)
        self.cache.start = start
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        stem: list[Tensor] = []
        top = self.X[-1][:, start:stop].detach().requires_grad_()

        def step(i: int, x: Tensor, *args: Any, **named: Any) -> Any:
            calls.append((args, named))
            stem.append(x)
            y = top if i + 1 == len(stack.layers) else x
            return (y, None) if stack.tuples else y

        labelled = bool((self.targets[start:stop] != IGNORED).any())
        with torch.enable_grad():
            out = stack.run(stack.model if labelled else stack.decoder, self.ids[:, start:stop], self.cache, step)
            dy = torch.zeros_like(top)
            if labelled:
                loss = self._loss(out.logits, start, stop)
                loss.backward()
                self.loss += float(loss.detach())
                assert top.grad is not None
                dy = top.grad
            del out
            for i in reversed(range(0 if stem[0].requires_grad else self._lowest(), len(stack.layers))):
                dy = self._through(i, calls[i], dy, start, stop)
            if stem[0].requires_grad:
                stem[0].backward(dy)
        self.behind = start
        return stop - start

    def _through(self, i: int, call: Any, dy: Tensor, start: int, stop: int) -> Tensor:
        """dX of layer i for the window, from dX of the layer above."""
        x = self.X[i][:, start:stop].detach().requires_grad_()
        args, named = call
        with self._seeded(start, i):
            y = self.stack.layers[i](x, *args, **named)
        self.cache.layers[i].backward(y[0] if isinstance(y, tuple) else y, dy)
        assert x.grad is not None
        return x.grad

    def _lowest(self) -> int:
        """The lowest layer that anything in is trained: gradients need not go further down."""
        trained = (any(p.requires_grad for p in layer.parameters()) for layer in self.stack.layers)
        return next((i for i, one in enumerate(trained) if one), len(self.stack.layers))

    def _loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        wide = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, self.targets[start:stop], ignore_index=IGNORED, reduction="sum")
        return total / self.count

    @contextmanager
    def _seeded(self, start: int, layer: int) -> Iterator[Callable[[], bool]]:
        """Draws of their own for a window's pass through a layer; gives whether anything was drawn."""
        device = self.stack.device
        on_gpu = device.type == "cuda"
        generator = torch.cuda.default_generators[device.index or 0] if on_gpu else torch.default_generator
        outer = generator.get_state()
        generator.manual_seed((self._seed + start * len(self.stack.layers) + layer) & (1 << 63) - 1)
        before = generator.get_state()
        try:
            yield lambda: not torch.equal(before, generator.get_state())
        finally:
            generator.set_state(outer)
