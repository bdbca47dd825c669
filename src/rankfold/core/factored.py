"""The core between two factors, `ΔW = s · B M A`: a good part of the low-rank methods are settings of it."""

from typing import ClassVar

import torch
from torch import Tensor

from rankfold.core.delta import Delta, Site


class Factored(Delta):
    """`ΔW = s B M A`: B (out, r), A (r, in), and between them M, full (r, r) or the diagonal (r,) of one.

    A subclass says what the paper calls M (`middle`), whether it is `full`, and which of the three are `trained`; the
    others are frozen and saved. It fills all of them in `start`, with `set_start` where the three come from W.
    """

    middle: ClassVar[str]
    full: ClassVar[bool] = False
    trained: ClassVar[frozenset[str]]

    def __init__(self, site: Site, rank: int, scale: float = 1.0, dropout: float = 0.0):
        super().__init__(site)
        self.scale, self.dropout = scale, dropout
        core = (rank, rank) if self.full else (rank,)
        for letter, shape in (("B", (site.out, rank)), (self.middle, core), ("A", (rank, site.in_))):
            if letter in self.trained:
                self.register_parameter(letter, site.parameter_like(*shape))
            else:
                self.register_buffer(letter, site.empty(*shape))

    @property
    def M(self) -> Tensor:
        return getattr(self, self.middle)

    def factors(self) -> tuple[Tensor, Tensor]:
        return (self.B @ self.M if self.full else self.B * self.M[..., None, :]), self.A

    @torch.no_grad()
    def set_middle(self, M: Tensor) -> Tensor:
        """Take M (r, r) as the core, or as much of it as the core can hold; the rest is given back, for B."""
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        if self.full:
            self.M.copy_(M)
            return eye
        diagonal = M.diagonal(dim1=-2, dim2=-1)
        if torch.equal(M, torch.diag_embed(diagonal)):
            self.M.copy_(diagonal)
            return eye
        self.M.fill_(1)
        return M
