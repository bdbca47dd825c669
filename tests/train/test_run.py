"""Whole runs on tiny models: what they write, each task, and a run that is killed and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rankfold
from rankfold.errors import RankfoldError
from rankfold.train import TrainingInterruptedError, read_recipe, train
from rankfold.train.recipe_file import validate, write_recipe
from rankfold.train.report import Report
from rankfold.train.watch import read_metrics
from tests.train import tiny


def run(output: Path, values: dict[str, Any], **options: Any) -> Report:
    return train(validate(values), output, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path, questions: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(output, tiny.recipe_values(llama_dir, questions, callbacks=["lora+"], budget={"steps": 30}))
    return output


def test_what_a_run_writes(finished: Path, llama_dir: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"] - 0.2
    assert report["parameters"] == 4096
    assert report["model_parameters"] == sum(p.numel() for p in tiny.llama().parameters())
    assert (report["train_rows"], report["held_out_rows"], report["steps"]) == (48, 12, 30)
    assert report["tokens"] == read_metrics(finished / "metrics.jsonl")[-1]["tokens"] > 30 * 4
    assert report["peak_memory"]["process"] > 2**26

    text = (finished / "report.md").read_text()
    assert f"{report['before']['loss']:.4f}" in text
    assert f"{report['after']['loss']:.4f}" in text
    assert "(loss.png)" in text
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    for sample in report["samples"]:
        assert sample["prompt"] in text
    assert read_recipe(finished / "recipe.yaml").budget.steps == 30


def test_the_adapter_it_wrote_scores_what_the_report_says(finished: Path) -> None:
    from rankfold.train.display import Display
    from rankfold.train.score import score

    report = json.loads((finished / "report.json").read_text())
    scores = score(read_recipe(finished / "recipe.yaml"), finished / "adapter", Display())
    assert scores["base"].loss == pytest.approx(report["before"]["loss"], rel=1e-6)
    assert scores["adapter"].loss == pytest.approx(report["after"]["loss"], rel=1e-6)


def test_samples_are_the_base_models_answers_and_the_adapted_ones(finished: Path, llama_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankfold.train.samples import generate

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama_dir), AutoTokenizer.from_pretrained(llama_dir)
    samples = json.loads((finished / "report.json").read_text())["samples"]
    prompts = [sample["prompt"] for sample in samples]
    before = [generate(model, tokenizer, [p], max_new_tokens=4, do_sample=False)[0] for p in prompts]
    rankfold.load(model, finished / "adapter")
    after = [generate(model, tokenizer, [p], max_new_tokens=4, do_sample=False)[0] for p in prompts]
    assert before != after
    assert [(s["before"], s["after"]) for s in samples] == list(zip(before, after, strict=True))


def test_the_metrics_tell_every_step(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 31))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, *range(3, 31, 3)]
    assert {"step", "seconds", "loss", "lr", "grad_norm", "epoch", "tokens"} == training[0].keys()
    assert training[-1]["lr"] < training[0]["lr"]


def test_a_taken_folder_is_refused(finished: Path, llama_dir: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(RankfoldError, match="holds a run already: add --resume"):
        run(finished, tiny.recipe_values(llama_dir, questions))
    (tmp_path / "something").write_text("precious")
    with pytest.raises(RankfoldError, match="is not empty"):
        run(tmp_path, tiny.recipe_values(llama_dir, questions))


def test_a_run_goes_on_only_with_its_own_recipe(finished: Path, llama_dir: Path, questions: Path) -> None:
    with pytest.raises(RankfoldError, match="has another recipe, different in: method, seed"):
        run(finished, tiny.recipe_values(llama_dir, questions, method="lora", seed=1, callbacks=["lora+"]), resume=True)


def test_resuming_a_finished_run_trains_no_more(finished: Path, llama_dir: Path, questions: Path) -> None:
    before = (finished / "adapter" / "adapter.safetensors").stat().st_mtime, read_metrics(finished / "metrics.jsonl")
    weights = load_file(finished / "adapter" / "adapter.safetensors")
    values = tiny.recipe_values(llama_dir, questions, callbacks=["lora+"], budget={"steps": 30})
    report = run(finished, values, resume=True)
    assert report.steps == 30
    assert read_metrics(finished / "metrics.jsonl") == before[1]
    after = load_file(finished / "adapter" / "adapter.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


# ---- stopping and going on


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    """With all that has a state: dropout, accumulated gradients, an offset start, callbacks, a schedule."""
    values = tiny.recipe_values(
        llama_dir,
        questions,
        init="pissa",
        callbacks=["lora+", "orthogonality"],
        batch={"size": 2, "accumulate": 3},
        budget={"steps": 40},
        schedule={"name": "cosine", "warmup": 0.1},
        checkpoint={"steps": 7},
        samples={"count": 0},
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_recipe(validate(values)))
    command = [sys.executable, "-m", "rankfold", "train", str(recipe), "--output", str(tmp_path / "killed")]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "killed" / "checkpoints" / "checkpoint-14").exists():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "adapter").exists(), "it was finished before the kill: nothing was tested"

    run(tmp_path / "killed", values, resume=True)
    run(tmp_path / "whole", values)
    whole, killed = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    from transformers.trainer_callback import TrainerCallback

    from rankfold.train.display import Display

    class PressAtStep3(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    class Pressing(Display):
        def watchers(self, progress: Any) -> list[TrainerCallback]:
            return [PressAtStep3()]

    values = tiny.recipe_values(llama_dir, questions, checkpoint={"steps": 100})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterruptedError) as stop:
        run(tmp_path / "stopped", values, display=Pressing())
    assert (stop.value.step, stop.value.signal) == (3, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["checkpoint-3"]
    run(tmp_path / "stopped", values, resume=True)
    run(tmp_path / "whole", values)
    whole, stopped = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    values = tiny.recipe_values(llama_dir, questions)
    run(tmp_path / "run", values)
    whole = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for part in ("checkpoints", "adapter"):
        shutil.rmtree(tmp_path / "run" / part)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off while it was written
    run(tmp_path / "run", values, resume=True)
    again = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in whole]


def test_old_checkpoints_are_deleted(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    run(tmp_path / "run", tiny.recipe_values(llama_dir, questions, checkpoint={"steps": 1, "keep": 3}))
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


# ---- budgets


@pytest.mark.parametrize(
    ("budget", "steps"), [({"epochs": 0.5}, 6), ({"epochs": 2, "steps": 3}, 3), ({"tokens": 200}, 8)], ids=str
)
def test_budgets(tmp_path: Path, llama_dir: Path, questions: Path, budget: dict[str, Any], steps: int) -> None:
    report = run(tmp_path / "run", tiny.recipe_values(llama_dir, questions, budget=budget))
    assert report.steps == steps
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["lr"] < 0.5 * lines[0]["lr"], "the schedule must reach its end with the budget"
    if "tokens" in budget:
        assert budget["tokens"] <= report.tokens < budget["tokens"] + 4 * 7


def test_a_budget_in_minutes(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    report = run(tmp_path / "run", tiny.recipe_values(llama_dir, questions, budget={"minutes": 0.02}))
    assert report.steps >= 1
    assert report.seconds >= 0.02 * 60


# ---- tasks


def test_chat_with_an_init_from_data_and_checkpointing(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    values = tiny.recipe_values(
        llama_dir,
        questions,
        init="eva",
        gradient_checkpointing=True,
        precision="bf16",
        method={"name": "lora", "rank": 2},
    )
    values["data"]["format"] = "chat"
    report = run(tmp_path / "run", values)
    assert report.after["loss"] < report.before["loss"]
    assert report.samples[0].prompt.endswith("?")


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2}, "full"], ids=str)
def test_products_of_low_precision(method: Any, tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    """int4 without a rotation is seen in the loss of the training, and never in that of the held-out rows."""
    base = {"budget": {"steps": 4}, "method": method}
    plain = run(tmp_path / "plain", tiny.recipe_values(llama_dir, questions, **base))
    rough = {"name": "halo", "level": 0, "format": "int4"}
    report = run(tmp_path / "run", tiny.recipe_values(llama_dir, questions, **base, low_precision=rough))
    assert report.before == plain.before
    first, exact = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("run", "plain"))
    losses = [next(line["loss"] for line in lines if "loss" in line) for lines in (first, exact)]
    assert 1e-4 < abs(losses[0] - losses[1]) < 0.5
    assert report.after != plain.after
    assert read_recipe(tmp_path / "run" / "recipe.yaml").low_precision.hyper == {"level": 0, "format": "int4"}


def test_sequence_classification_trains_its_new_head(tmp_path: Path, bert_dir: Path, questions: Path) -> None:
    values = tiny.recipe_values(bert_dir, questions, budget={"steps": 40})
    values["data"] |= {"format": "classification", "columns": {"text": "question", "label": "kind"}}
    report = run(tmp_path / "run", values)
    assert report.after["loss"] < report.before["loss"]
    assert {"accuracy", "loss", "count"} == report.after.keys()
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert (recipe.modules_to_save, recipe.data.labels) == (("classifier",), ("high", "low"))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert saved["modules.classifier.weight"].shape == (2, 32)
    assert report.samples[0].after in ("high", "low")


def test_seq2seq(tmp_path: Path, t5_dir: Path, questions: Path) -> None:
    values = tiny.recipe_values(t5_dir, questions, budget={"steps": 20})
    values["data"]["format"] = "seq2seq"
    report = run(tmp_path / "run", values)
    assert report.after["loss"] < report.before["loss"]


def test_image_classification(tmp_path: Path, vit_dir: Path) -> None:
    label = np.arange(40) % 2
    pictures = np.zeros((40, 28, 28), np.uint8)
    pictures[label == 1, :14] = 255
    np.savez(tmp_path / "halves.npz", image=pictures, label=label)
    values = tiny.recipe_values(vit_dir, tmp_path / "halves.npz", budget={"steps": 12})
    values["data"] = {"path": str(tmp_path / "halves.npz"), "format": "image-classification", "image_size": 28}
    report = run(tmp_path / "run", values)
    assert report.after["accuracy"] == 1.0
    assert report.tokens == 0


def test_plain_text(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    values = tiny.recipe_values(llama_dir, questions)
    values["data"] |= {"format": "text", "columns": {"text": "{question}={answer}"}}
    report = run(tmp_path / "run", values)
    assert report.after["loss"] < report.before["loss"]


# ---- what is wrong is told before a model is loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lorra"}, "method: no component is called 'lorra'"),
        ({"method": {"name": "lora", "rnk": 2}}, "method: lora: .*rnk"),
        ({"method": "pissa"}, "method: pissa is no method; of that kind there are: .*lora"),
        ({"init": "lora"}, "init: lora is no init; .*pissa"),
        ({"callbacks": ["lora+", "lora"]}, "callbacks.1: lora is no callback"),
        ({"optimizer": {"name": "adamv"}}, "optimizer.name: there is no 'adamv'; did you mean adam"),
        ({"optimizer": {"name": "sgd", "beta": 1}}, "optimizer.beta: SGD has no such argument; it has: .*momentum"),
        ({"optimizer": {"name": "sgd", "momentum": -1}}, "optimizer: SGD refuses its arguments: .*momentum"),
        ({"schedule": {"name": "linnear"}}, "schedule.name: there is no 'linnear'"),
        ({"log": {"report_to": ["my-tracker"]}}, "log.report_to: my-tracker is unknown or not installed"),
        ({"precision": "fp16"}, "precision: fp16 needs an accelerator"),
        ({"model": "missing/model.gguf"}, "model.path: no such file or directory"),
        ({"model": "no-such/model"}, "model.path: cannot load no-such/model"),
    ],
    ids=str,
)
def test_wrong_names(tmp_path: Path, llama_dir: Path, questions: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RankfoldError, match=message):
        run(tmp_path / "run", {**tiny.recipe_values(llama_dir, questions), **change})


def test_other_optimisers_and_schedules(tmp_path: Path, llama_dir: Path, questions: Path) -> None:
    changes = {"optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9}, "schedule": {"name": "cosine", "warmup": 2}}
    report = run(tmp_path / "run", tiny.recipe_values(llama_dir, questions, **changes))
    assert report.after["loss"] < report.before["loss"]
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert rates[:3] == [0.0, 0.25, 0.5]


def test_the_adapter_loads_into_a_fresh_model(finished: Path, llama_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    adapter = rankfold.load(model, finished / "adapter")
    assert adapter.num_parameters() == 4096
