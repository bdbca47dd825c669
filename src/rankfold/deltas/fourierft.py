"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al. 2024, arXiv 2405.03003."""

import functools
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Site, fill


class FourierFT(Method):
    """`ΔW = α Re(ifft2(F))`: the spectrum F (out, in) is zero but for n trained real entries c at random places.

    The places come from `entry_seed` alone, so layers of one shape share them, and only c (n,) is trained and saved.
    A weight with fewer than n entries trains all of them. `start="zero"` leaves the layer what it was; "normal", which
    is the paper's and PEFT's default, draws c from N(0, 1) and **changes the layer's function**.
    """

    slug: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform"
    source: ClassVar[str] = "arXiv 2405.03003"

    n: Annotated[int, Field(ge=1, description="trained entries of the spectrum, at most in × out")] = 1000
    alpha: float = 150.0
    entry_seed: Annotated[int, Field(ge=0, description="seed of the places of the entries")] = 777
    start: Literal["zero", "normal"] = "zero"

    def delta(self, site: Site, shared: nn.Module | None) -> "FourierFTDelta":
        return FourierFTDelta(site, self)

    def count(self, site: Site) -> int:
        return min(self.n, site.in_ * site.out)


class FourierFTDelta(Delta):
    """c (n,); `places` (n,) of them in the flattened F, made again from the seed."""

    places: Tensor

    def __init__(self, site: Site, method: FourierFT):
        super().__init__(site)
        self.scale, self.drawn = method.alpha, method.start
        places = random_places(site.out * site.in_, method.count(site), method.entry_seed)
        self.register_buffer("places", places.to(site.device or "cpu"), persistent=False)
        self.c = site.parameter_like(len(places))

    def start(self, rng: torch.Generator) -> None:
        if self.drawn == "normal":
            fill(self.c, rng, std=1.0)
        else:
            nn.init.zeros_(self.c)

    def update(self) -> Tensor:
        out, n = self.site.out, self.site.in_
        F = self.c.new_zeros(*self.c.shape[:-1], out * n).index_copy(-1, self.places, self.c)
        return self.scale * torch.fft.ifft2(F.unflatten(-1, (out, n))).real


@functools.lru_cache(32)
def random_places(size: int, n: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].clone()
