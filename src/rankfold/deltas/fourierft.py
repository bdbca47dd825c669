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
    size: ClassVar[str] = "n"

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
        """`Re(ifft2(F))` is ifft2 of F's even part, `(F[u, v] + F[−u, −v]) / 2`; half its columns say the rest."""
        out, n = self.site.out, self.site.in_
        u, v = self.places // n, self.places % n
        right, middle = 2 * v > n, v * (n - 2 * v) == 0  # to be read at (−u, −v); columns that mirror in themselves
        u, v = torch.where(right, (out - u) % out, u), torch.where(right, n - v, v)
        columns = n // 2 + 1
        places = torch.cat([u * columns + v, torch.where(middle, (out - u) % out, u) * columns + v])
        halves = self.scale * self.c * torch.where(middle, 0.5, 0.25).to(self.c.dtype)
        H = self.c.new_zeros(*self.c.shape[:-1], out * columns).index_add(-1, places, torch.cat([halves, halves], -1))
        return torch.fft.irfft2(H.unflatten(-1, (out, columns)), (out, n))


@functools.lru_cache(32)
@torch.inference_mode(False)  # what is kept may meet a backward later
def random_places(size: int, n: int, seed: int) -> Tensor:
    """n of the numbers below size, in the order in which PEFT draws them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")[:n].clone()
