"""A train step (forward and backward) with LoRA on all linear layers but the head, over the frozen model's.

All sides get the same embeddings as inputs and compute the gradient to them, so that the frozen model's backward goes
through every layer. Training from token ids needs less: the first layer's input then has no gradient; that is the side
`rankfold, from ids`.
"""

import harness
import models
import peft
import torch

import rankfold

TARGETS = {8: 1.10, 64: 1.25}


def step(model, inputs, labels, adapter=(), to_inputs=True):
    def run():
        embeddings = inputs.clone().requires_grad_(to_inputs)
        model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
        for parameter in adapter:
            parameter.grad = None

    return run


def main():
    given = harness.arguments(__doc__, rounds=15)
    labels = models.tokens(4, 128)
    frozen = models.llama(8, 512)
    inputs = frozen.get_input_embeddings()(labels)
    rows = []
    for rank, target in TARGETS.items():
        ours, theirs = models.llama(8, 512), models.llama(8, 512)
        adapter = list(rankfold.attach(ours, rankfold.LoRA(rank=rank)).parameters())
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        theirs = peft.get_peft_model(theirs, config)
        peft_adapter = [p for p in theirs.parameters() if p.requires_grad]
        assert sum(p.numel() for p in adapter) == sum(p.numel() for p in peft_adapter)
        for parameter in (*adapter, *peft_adapter):
            torch.nn.init.normal_(parameter, std=0.02)
        sides = {
            "frozen": step(frozen, inputs, labels),
            "rankfold": step(ours, inputs, labels, adapter),
            "rankfold, from ids": step(ours, inputs, labels, adapter, to_inputs=False),
            "peft": step(theirs, inputs, labels, peft_adapter),
        }
        samples = harness.interleaved(sides, given.rounds, patience=given.patience)
        rows += harness.table(samples, "frozen", {"rankfold": target}, rank=rank)
    harness.report(given, "train_step", rows)


if __name__ == "__main__":
    main()
