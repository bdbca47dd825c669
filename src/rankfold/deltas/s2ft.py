"""S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity.

Yang et al. 2024, arXiv 2412.06289.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site
from rankfold.core.calibration import InputSecondMoment, MeanGradient, Statistic
from rankfold.core.layers import as_matrix
from rankfold.core.quantized import dense


class S2FT(Method):
    """Whole channels C of a weight are trained: `ΔW[:, C] = V` (columns) or `ΔW[C, :] = V` (rows), V from 0.

    A channel couples weights: an inner channel of a feed-forward block is a row of up and gate and a column of down,
    one of an attention head (with `group` = head_dim, all of a head's together) a row of v and a column of o. Layers
    whose name ends with one of `rows` train rows, all others columns: one side of a couple is enough.

    `ratio` of the channels are chosen, among all layers of one name and shape at once, so that layers differ in count
    and one may get none; at least one channel in all. `select` is at random, or the channels of largest or smallest
    norm: `by="weight"`; with calibration data, "activation" (the root of E[x_c²], columns only, for it is their input
    x), "product" of the two, or "gradient" (of its mean over the data). A group's norm is that of all its channels.
    Heads want a group of their own: `overrides={"o_proj": {"group": head_dim, "ratio": 0.052}}`.

    The authors permute the chosen channels to the front, so that they are one slice (`rankfold.core.coupling` does it,
    by groups that share a key and a value, where theirs mixes up the heads of grouped queries). By index the outputs
    and gradients are the same, and adapters can be merged and exchanged without permuting anything back.
    """

    slug: ClassVar[str] = "s2ft"
    title: ClassVar[str] = "S^2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity"
    source: ClassVar[str] = "arXiv 2412.06289"
    size: ClassVar[str] = "ratio"

    ratio: Annotated[float, Field(gt=0, le=1, description="share of the channels")] = 0.03
    group: Annotated[int, Field(ge=1, description="channels that are chosen together, such as those of a head")] = 1
    select: Literal["random", "largest", "smallest"] = "random"
    by: Literal["weight", "activation", "product", "gradient"] = "weight"
    rows: tuple[str, ...] = ("up_proj", "gate_proj", "v_proj")
    groups: Annotated[int | None, Field(ge=1, description="how many of them in a weight; over ratio")] = None

    def by_row(self, site: Site) -> bool:
        return any(site.name == name or site.name.endswith(f".{name}") for name in self.rows)

    def channels(self, site: Site) -> tuple[int, int]:
        """How many channels the site has, and how long each is."""
        return (site.out, site.in_) if self.by_row(site) else (site.in_, site.out)

    def chosen(self, site: Site) -> int:
        """|C| at a site."""
        n = self.channels(site)[0] // self.group
        return self.group * (max(1, int(self.ratio * n)) if self.groups is None else self.groups)

    def count(self, site: Site) -> int:
        return self.chosen(site) * self.channels(site)[1]

    def needs(self) -> tuple[Statistic, ...]:
        if self.select == "random" or self.by == "weight":
            return ()
        return (MeanGradient(),) if self.by == "gradient" else (InputSecondMoment(),)

    def refuses(self, site: Site) -> str | None:
        n = self.channels(site)[0]
        if self.by_row(site) and InputSecondMoment() in self.needs():
            return "it trains rows, whose activations are another layer's input: choose by weight or gradient"
        if n % self.group:
            return f"its {n} channels are no multiple of group = {self.group}"
        return f"{self.chosen(site)} channels are over its {n}" if self.chosen(site) > n else None

    def spread(self, sites: Sequence[Site], seed: int) -> dict[str, dict[str, Any] | None]:
        """How many groups each layer gets of those that layers of one name and shape have together."""
        pools: dict[Any, list[Site]] = {}
        for site in sites:
            if self.groups is None and self.refuses(site) is None:
                pools.setdefault((site.name.rpartition(".")[2], site.kind, site.batch, site.out, site.in_), []).append(
                    site
                )
        counts: dict[str, dict[str, Any] | None] = {}
        for pool in pools.values():
            n = self.channels(pool[0])[0] // self.group
            k = max(1, int(self.ratio * n * len(pool)))
            if self.select == "random":
                chosen = torch.randperm(n * len(pool), generator=pool[0].rng(seed))[:k]
            else:
                # Experts of one fused weight get as many channels each, so their mean speaks for them.
                norms = [self.norms(site).reshape(-1, n).mean(0) for site in pool]
                chosen = torch.cat(norms).topk(k, largest=self.select == "largest").indices.cpu()
            for site, number in zip(pool, (chosen // n).bincount(minlength=len(pool)).tolist(), strict=True):
                counts[site.name] = {"groups": number} if number else None
        return counts

    def norms(self, site: Site) -> Tensor:
        """The norm, in what they are chosen by, of each group of channels (*batch, n)."""
        if self.by == "gradient":
            M = site.statistics.get(MeanGradient(), site.name)
        else:
            M = as_matrix(site, dense(site.stored, site.layer)).detach()
        squares = (M if self.by_row(site) else M.mT).float().square().sum(-1)
        if self.by in ("activation", "product"):
            inputs = site.statistics.get(InputSecondMoment(), site.name).to(squares)
            squares = inputs if self.by == "activation" else inputs * squares
        return squares.unflatten(-1, (-1, self.group)).sum(-1).sqrt()

    def delta(self, site: Site, shared: nn.Module | None) -> "S2FTDelta":
        return S2FTDelta(site, self)


class S2FTDelta(Delta):
    """V (out, |C|) or (|C|, in), and the saved C (|C|,); experts have channels of their own."""

    C: Tensor

    def __init__(self, site: Site, method: S2FT):
        super().__init__(site)
        self.method, self.by_row, c = method, method.by_row(site), method.chosen(site)
        self.V = site.parameter_like(c, site.in_) if self.by_row else site.parameter_like(site.out, c)
        self.register_buffer("C", torch.zeros(*site.batch, c, dtype=torch.int32, device=site.device))

    def start(self, rng: torch.Generator) -> None:
        nn.init.zeros_(self.V)
        k, n = self.C.shape[-1] // self.method.group, self.method.channels(self.site)[0] // self.method.group
        if self.method.select == "random":
            scores = torch.rand(*self.site.batch, n, generator=rng)
        else:
            scores = self.method.norms(self.site)
        groups = scores.topk(k, largest=self.method.select != "smallest").indices.sort(-1).values
        within = torch.arange(self.method.group, device=groups.device)
        self.C.copy_((groups[..., None] * self.method.group + within).flatten(-2))

    def update(self) -> Tensor:
        return self._onto(self.V.new_zeros(*self.site.batch, self.site.out, self.site.in_))

    def adapted_weight(self, W: Tensor) -> Tensor:
        return self._onto(W)

    def _onto(self, W: Tensor) -> Tensor:
        """W with V added to its channels C; every other bit is W's."""
        C = self.C.long()
        index = C[..., :, None] if self.by_row else C[..., None, :]
        return W.scatter_add(-2 if self.by_row else -1, index.expand(self.V.shape), self.V.to(W.dtype))

    def linear(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """x Wᵀ + x[..., C] Vᵀ, or x Wᵀ with x Vᵀ added to its channels C. The column form keeps x[..., C] alone."""
        y = None if W is None else F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        if self.by_row:
            part = F.linear(x, self.V.to(x.dtype))
            y = part.new_zeros(*part.shape[:-1], self.site.out) if y is None else y
            return y.index_add(-1, self.C, part)
        part = F.linear(x.index_select(-1, self.C), self.V.to(x.dtype))
        return part if y is None else y + part

    def wrong(self, tensors: Mapping[str, Tensor]) -> str | None:
        C, n = tensors["C"], self.method.channels(self.site)[0]
        if int(C.min()) < 0 or int(C.max()) >= n:
            return f"a channel lies outside of the weight's {n:,}"
        return "a channel stands there twice" if bool((C.sort(-1).values.diff() == 0).any()) else None
