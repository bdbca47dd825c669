"""An adapted model under other people's trainers: it is still the user's own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import rankfold
from tests.train import tiny


def rows() -> Dataset:
    return Dataset.from_list([{"text": f"{i} and {i} is {2 * i}"} for i in range(8)])


def arguments(cls: Any, tmp_path: Path, **more: Any) -> Any:
    return cls(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", **more,
    )  # fmt: skip


def adapted() -> tuple[Any, rankfold.Adapter, dict[str, torch.Tensor]]:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    own = {id(p) for p in adapter.parameters()}
    return model, adapter, {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in own}


def check_trained(model: Any, adapter: rankfold.Adapter, base: dict[str, torch.Tensor]) -> None:
    assert all(bool(p.any()) for n, p in adapter.named_parameters()), "B left its zeros everywhere"
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())


def test_transformers_trainer(tmp_path: Path) -> None:
    model, adapter, base = adapted()
    tokenizer = tiny.tokenizer()
    encoded = rows().map(lambda row: tokenizer(row["text"]), remove_columns="text")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    args = arguments(transformers.TrainingArguments, tmp_path)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=encoded, data_collator=collator)
    trainer.train()
    check_trained(model, adapter, base)


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, adapter, base = adapted()
    args = arguments(trl.SFTConfig, tmp_path, max_length=32)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows(), processing_class=tiny.tokenizer())
    trainer.train()
    check_trained(model, adapter, base)
