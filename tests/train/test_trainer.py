"""The bridge to transformers.Trainer: the same numbers as a bare loop, and a clear stop when something is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from pydantic import PrivateAttr
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig

import rankfold
from examples import bare_loop
from rankfold.errors import RankfoldError
from rankfold.train import AdapterTrainer, TrainingStoppedError, parameter_groups
from tests.train import tiny

ROWS = [{"input_ids": (ids := [5 + (i * k) % 90 for k in range(1, 9 + i % 3)]), "labels": ids} for i in range(16)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right; the first half of each row carries no loss."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        ids[i, : len(tokens)] = tokens
        labels[i, len(tokens) // 2 : len(tokens)] = tokens[len(tokens) // 2 :]
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def make(tmp_path: Path, model: torch.nn.Module, adapter: Any, techniques: Any = (), **args: Any) -> AdapterTrainer:
    settings = {
        "output_dir": str(tmp_path / "checkpoints"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        **args,
    }
    return AdapterTrainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        adapter=adapter,
        techniques=techniques,
        data_collator=collate,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:5]),
    )


class Recorder(rankfold.Callback):
    """Writes down what it is called with; its penalty pulls every parameter to zero.

    Without a slug it stays out of the registry, which other tests in this process look at.
    """

    weight: float = 0.01
    _adapter: Any = PrivateAttr(None)
    _calls: list[tuple[str, int]] = PrivateAttr(default_factory=list)

    def on_attach(self, adapter: Any, model: torch.nn.Module) -> None:
        self._adapter = adapter

    def penalty(self) -> Tensor:
        return self.weight * sum(p.square().sum() for p in self._adapter.parameters())

    def before_step(self, step: int) -> None:
        self._calls.append(("before", step))

    def after_step(self, step: int) -> None:
        self._calls.append(("after", step))

    def on_save(self) -> dict[str, Any]:
        return {"calls": len(self._calls), "tensor": torch.arange(3)}

    def on_load(self, state: Mapping[str, Any]) -> None:
        assert state["tensor"].tolist() == [0, 1, 2]
        self._calls = [("loaded", state["calls"])]


def test_it_trains_as_a_bare_loop_does(tmp_path: Path) -> None:
    states = []
    for bare in (True, False):
        model = tiny.llama()
        adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
        techniques = [rankfold.build("lora+", ratio=4), Recorder()]
        if bare:
            loader = [collate(ROWS[i : i + 4]) for i in range(0, 16, 4)]
            bare_loop.train(model, adapter, loader, techniques, lr=1e-2)
        else:
            make(tmp_path, model, adapter, techniques).train()
        assert techniques[1]._calls == [(when, step) for step in range(4) for when in ("before", "after")]
        states.append(adapter.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """Also with a penalty, which must not count once for every part."""
    states = []
    for size, parts in ((8, 1), (2, 4)):
        model = tiny.llama()
        adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 2}
        make(tmp_path, model, adapter, [Recorder(weight=1.0)], **args).train()
        states.append(adapter.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4), targets=["q_proj"])
    own = {id(p) for p in adapter.parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make(tmp_path, model, adapter).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in own), name


def test_evaluate_is_the_mean_over_tokens_however_batched(tmp_path: Path) -> None:
    model = tiny.llama().eval()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    total = count = 0.0
    for row in ROWS[:5]:
        batch = collate([row])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    for size in (1, 2, 5):
        trainer = make(tmp_path, model, adapter, per_device_eval_batch_size=size)
        trainer.state.global_step = 1
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-6)
        assert metrics["eval_count"] == count


def test_at_step_0_the_base_is_measured(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    trainer = make(tmp_path, model, adapter)
    base = trainer.evaluate()["eval_loss"]
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    assert trainer.evaluate()["eval_loss"] == base
    trainer.state.global_step = 1
    assert trainer.evaluate()["eval_loss"] != base


def test_measuring_does_not_change_the_training(tmp_path: Path) -> None:
    states = []
    for steps in (1, 100):
        model = tiny.llama()
        adapter = rankfold.attach(model, rankfold.LoRA(rank=4, dropout=0.5))
        make(tmp_path, model, adapter, eval_strategy="steps", eval_steps=steps).train()
        states.append(adapter.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))

    class Poison(Recorder):
        def penalty(self) -> Tensor:
            steps = len(self._calls) // 2
            return super().penalty() * (float("nan") if steps == 2 else 1.0)

    trainer = make(tmp_path, model, adapter, [Poison()])
    with pytest.raises(TrainingStoppedError, match=r"the loss became nan at step 3\. .*checkpoint-2/adapter") as stop:
        trainer.train()
    saved = Path(str(stop.value).split(" are in ")[1].split(". A lower")[0])
    fresh = tiny.llama()
    loaded = rankfold.load(fresh, saved)
    assert all(bool(torch.isfinite(t).all()) and bool(t.any()) for t in loaded.state_dict().values())
    assert all(torch.equal(t, adapter.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))

    class Endless(Recorder):
        def penalty(self) -> Tensor:  # finite, with a gradient that is not
            return sum(p.square().sum().sqrt() for n, p in self._adapter.named_parameters() if n.endswith("B"))

    with pytest.raises(TrainingStoppedError, match="the gradient's norm became nan at step 1"):
        make(tmp_path, model, adapter, [Endless()]).train()
    assert all(bool(torch.isfinite(p).all()) for p in adapter.parameters())


def test_a_dead_adapter_is_found_at_the_first_step(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    with pytest.raises(TrainingStoppedError, match="'default' is dead: the gradient of each of its 4,096 parameters"):
        make(tmp_path, model, adapter).train()


def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    """In one process, through Trainer's own argument; a real kill is tested in test_run.py."""
    states = []
    for stops in ((), (3,)):
        folder = tmp_path / str(len(states))
        for end in (*stops, 6):
            model = tiny.llama()
            adapter = rankfold.attach(model, rankfold.LoRA(rank=4, dropout=0.3), seed=1)
            recorder = Recorder()
            args = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random", "max_steps": end}
            trainer = make(folder, model, adapter, [recorder], gradient_accumulation_steps=2, **args)
            trainer.train(resume_from_checkpoint=end == 6 and bool(stops))
        states.append(adapter.state_dict())
        if stops:
            assert recorder._calls[0] == ("loaded", 6)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    trainer = make(tmp_path, model, adapter, save_strategy="steps", save_steps=2)

    def full_disk(folder: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError("no space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert [p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_checkpoints_hold_no_base_weights_and_no_code(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    make(tmp_path, model, adapter, save_strategy="steps", save_steps=4).train()
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    assert {p.name for p in folder.iterdir()} == {
        "adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rankfold.pt", "trainer_state.json"
    }  # fmt: skip
    with transformers.trainer_pt_utils.safe_globals():
        for file in folder.glob("*.pt*"):
            torch.load(file, weights_only=True)


def test_parameter_groups() -> None:
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    (group,) = parameter_groups(adapter, [], 0.1, 0.2)
    assert (len(group["params"]), group["lr"], group["weight_decay"]) == (28, 0.1, 0.2)
    slow, fast = parameter_groups(adapter, [Recorder(), rankfold.build("lora+", ratio=8)], 0.1, 0.2)
    assert (len(slow["params"]), len(fast["params"]), fast["lr"]) == (14, 14, pytest.approx(0.8))
    with pytest.raises(RankfoldError, match=r"lora\+ and lora\+ both set"):
        parameter_groups(adapter, [rankfold.build("lora+"), rankfold.build("lora+")], 0.1, 0.2)

    class Half(Recorder):
        def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
            return [{"params": list(adapter.parameters())[::2]}]

    Half.slug = "half"
    with pytest.raises(RankfoldError, match="half do not hold each parameter once"):
        parameter_groups(adapter, [Half()], 0.1, 0.2)


@pytest.mark.parametrize("name", ["nf4", "torchao-int8"])
def test_trains_over_a_model_that_was_loaded_quantised(name: str, tmp_path: Path, llama_dir: Path) -> None:
    """Trainer itself refuses one ("purely quantized"), since it looks for PEFT's adapters only."""
    quantization = {
        "nf4": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "torchao-int8": transformers.TorchAoConfig(Int8WeightOnlyConfig()),
    }[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=quantization)
    adapter = rankfold.attach(model, rankfold.LoRA(rank=4))
    trainer = make(tmp_path, model, adapter, max_steps=8)
    before = trainer.measure().loss
    trainer.train()
    assert trainer.measure().loss < before - 0.05
    assert model.is_quantized
