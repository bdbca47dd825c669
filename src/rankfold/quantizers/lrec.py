"""INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation. Chai
et al. 2023, arXiv 2306.08162."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankfold.core.calibration import Calibration
from rankfold.quantizers._distil import Lesson, distil, optimizer_tensors, put_optimizer
from rankfold.quantizers._quantizer import Compensation, nearest


class LREC(Compensation):
    """Low-rank error correction: a LoRA over the packed model learns to make it say what the float model says.

        y = x Ŵᵀ + (x Aᵀ) Bᵀ,  min KL(p_float ‖ p) over A and B, on text without labels

    A starts random and B = 0, as LoRA's, so that at the start nothing is corrected; with `start="lorc"` both start as
    the best product for `W − Ŵ`. What the float model says of the calibration text is kept on disk. Codes are all that
    the packed layers keep for the backward pass, where they are dequantised again (the paper's EMEF). The adapter goes
    on to be tuned for a task, or another one beside it.
    """

    slug: ClassVar[str] = "lrec"
    title: ClassVar[str] = (
        "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation"
    )
    source: ClassVar[str] = "arXiv 2306.08162"

    rank: Annotated[int, Field(ge=1, description="r")] = 16
    start: Literal["lora", "lorc"] = "lora"
    lr: Annotated[float, Field(gt=0, description="of AdamW, with a cosine to 0")] = 1e-3
    epochs: Annotated[int, Field(ge=1, description="times that the text is gone through")] = 2
    seed: int = 0

    @property
    def distils(self) -> bool:
        return True

    def factors(self, E: Tensor, statistics: Calibration | None, site: str) -> tuple[Tensor, Tensor]:
        if self.start == "lorc":
            return nearest(E, self.rank)
        drawn = torch.Generator().manual_seed(self.seed + zlib.crc32(site.encode()))
        A = torch.empty(min(self.rank, *E.shape), E.shape[1])
        nn.init.kaiming_uniform_(A, math.sqrt(5), generator=drawn)
        return E.new_zeros(E.shape[0], len(A)), A.to(E)

    def distil(self, model: nn.Module, parameters: Sequence[nn.Parameter], lesson: Lesson) -> None:
        distil(model, Products(parameters, self.lr), lesson, epochs=self.epochs, seed=self.seed)


class Products:
    """A and B of all layers, while they learn."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float):
        self.parameters, self.lr = parameters, lr
        self.adamw = torch.optim.AdamW(parameters, weight_decay=0.0)

    def step(self, share: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.param_groups[0]["lr"] = self.lr * share
        self.adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        return {f"factor.{i}": p for i, p in enumerate(self.parameters)} | optimizer_tensors(self.adamw, "adamw")

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(tensors[f"factor.{i}"])
        put_optimizer(self.adamw, "adamw", tensors)
