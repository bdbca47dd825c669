"""The trainer of a job beside inference: windows of tokens, each in its turn."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from rankfold.serve.stack import Stack
from rankfold.serve.turns import Turns
from rankfold.serve.windows import Windowed
from rankfold.train.evaluate import Score, counted_labels
from rankfold.train.trainer import AdapterTrainer

BACKWARD = 3  # tokens that one counts on its way back: through its layers, which are computed again, and the head


class WindowTrainer(AdapterTrainer):
    """An `AdapterTrainer` whose passes go through the model by windows, sequence by sequence.

    Its steps are those of the same recipe elsewhere: each label has the weight that it has in the whole accumulated
    batch. What differs is that the base stays in eval mode, without dropout of its own, as it serves others meanwhile.
    """

    def __init__(self, *args: Any, stack: Stack, turns: Turns, **named: Any):
        super().__init__(*args, **named)
        self.stack, self.turns = stack, turns
        self._alone = False  # once a window could not go beside requests, for one where dropout is drawn
        self.model_accepts_loss_kwargs = True  # whatever the model does with it, the count of labels is ours
        self.args._n_gpu = 1

    def _with_backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        self.adapter.train()
        total = 0.0
        for ids, labels in _rows(inputs):
            run = Windowed(self.stack, ids, labels, float(num_items_in_batch))
            while run.done < run.length:
                n = self.turns.take(None if self._alone else run)
                if run.done < run.length:  # the rest may have gone beside the host's requests meanwhile
                    self.turns.use(run.forward(n))
                self._alone |= run.alone
            while run.behind:
                self.turns.use(BACKWARD * run.backward(max(1, self.turns.take() // BACKWARD)))
            total += run.loss
        loss = self._penalised(torch.tensor(total, device=self.stack.device), num_items_in_batch)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def measure(self, adapted: bool = True) -> Score:
        self.adapter.train(False)
        loss, count = 0.0, 0
        rows: Any = self.eval_dataset
        for row in rows:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            run = Windowed(self.stack, ids, labels, count=1.0, seed=0)
            while run.done < run.length:
                n = self.turns.take()
                with rankfold.using(self.adapter.model, self.adapter.name if adapted else None):
                    self.turns.use(run.forward(n, score=True))
            loss, count = loss + run.loss, count + counted_labels(labels, self.task)
        return Score(loss / count, count)


def _rows(inputs: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each sequence of a batch and its labels, without the padding."""
    for i, ids in enumerate(inputs["input_ids"]):
        there = inputs["attention_mask"][i].bool()
        yield ids[there], inputs["labels"][i][there]
