"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

Liu et al. 2022, arXiv 2205.05638.
"""

import re
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site

# The second feed-forward layer, as the common models call it; a name inside an `attention` block is not one.
SECOND_FEEDFORWARD = (
    r"(?!.*\battention\b)(.*\.)?"
    r"(down_proj|fc2|wo|w2|lin2|fc_out|dense_4h_to_h|mlp\.c_proj|mlp\.dense_4h_to_h|output\.dense|ffn\.output)"
)


class IA3(Method):
    """Learned gains l, all ones at start: `W' = diag(l) W, b' = l ⊙ b`, or `W' = W diag(l)` on the input.

    `feedforward` says which layers get the gain on their input (the paper: the second feed-forward layer); the others
    get it on their output (the paper: keys and values). A string is a regular expression for the whole path, a list
    holds path suffixes, as in PEFT, which also scales the bias of an output. A convolution has a gain for each channel.
    """

    slug: ClassVar[str] = "ia3"
    title: ClassVar[str] = "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    source: ClassVar[str] = "arXiv 2205.05638"

    feedforward: Annotated[
        str | tuple[str, ...],
        Field(description="layers with the gain on their input: a regular expression or suffixes"),
    ] = SECOND_FEEDFORWARD

    def on_input(self, site: Site) -> bool:
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, site.name) is not None
        return any(site.name == suffix or site.name.endswith("." + suffix) for suffix in self.feedforward)

    def delta(self, site: Site, shared: nn.Module | None) -> "InputGain | OutputGain":
        return InputGain(site) if self.on_input(site) else OutputGain(site)

    def count(self, site: Site) -> int:
        return channels(site) if self.on_input(site) else site.out

    def refuses(self, site: Site) -> str | None:
        if site.kind == "embedding" and self.on_input(site):
            return "ids have no size that a gain on the input could change"
        return None


def channels(site: Site) -> int:
    """How many input features the layer has; a convolution's matrix has several columns for each."""
    return site.layer.in_channels if site.kind == "conv" else site.in_


class OutputGain(Delta):
    """l (out,)."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.l = site.parameter_like(site.out)

    def start(self, rng: torch.Generator) -> None:
        nn.init.ones_(self.l)

    def transform(self, W: Tensor) -> Tensor:
        return self.l[..., None] * W

    def bias_update(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else (self.l - 1) * b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.layer.outwise(self.l)


class InputGain(Delta):
    """l (in,)."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.l = site.parameter_like(channels(site))

    def start(self, rng: torch.Generator) -> None:
        nn.init.ones_(self.l)

    def transform(self, W: Tensor) -> Tensor:
        if self.site.kind != "conv":
            return W * self.l[..., None, :]
        groups = (
            self.site.layer.groups
        )  # row o of W sees the channels of its own group, each at every place of the kernel
        columns = W.unflatten(1, (self.l.numel() // groups, -1)).unflatten(0, (groups, -1))
        return (columns * self.l.view(groups, 1, -1, 1)).reshape(W.shape)

    def inputs(self, x: Tensor) -> Tensor:
        return x * self.layer.outwise(self.l)
