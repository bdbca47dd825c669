"""BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models. Luo et al. 2024,
arXiv 2404.02827.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from rankfold.optim._blocks import BlockSchedule


class BAdam(BlockSchedule):
    """Block coordinate descent: one layer at a time is trained for K steps, from moments of zero, then the next.

    `order` is that of the layers: `descending`, `ascending`, `random`, a fresh permutation each time all have had their
    turn, or `fixed`, which stays with the last. Embeddings, head and whatever else is in no layer are frozen unless
    `outside`. Biases and other vectors are not decayed. (In the authors' code the first layer gets K − 1 steps, and
    biases are decayed, though they mean not to.)
    """

    slug: ClassVar[str] = "badam"
    title: ClassVar[str] = "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models"
    source: ClassVar[str] = "arXiv 2404.02827"
    restart: ClassVar[bool] = True

    every: Annotated[int, Field(ge=1, description="steps K before the next layer")] = 50
    order: Literal["descending", "ascending", "random", "fixed"] = "descending"
    outside: Annotated[bool, Field(description="train what is in no layer all the time")] = False

    def trains_outside(self) -> bool:
        return self.outside

    def chosen(self, interval: int, count: int) -> Sequence[int]:
        turn = interval % count
        match self.order:
            case "ascending":
                return [turn]
            case "descending":
                return [count - 1 - turn]
            case "random":
                return [int(torch.randperm(count, generator=self.rng(interval // count))[turn])]
            case "fixed":
                return [count - 1]

    def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        matrices = [p for p in adapter.parameters() if p.dim() > 1]
        vectors = [p for p in adapter.parameters() if p.dim() <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]
