"""The command line as a user meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rankfold import cli
from tests.train import tiny


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    capfd.readouterr()
    code = cli.run([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, a recipe, and a finished run of it."""
    place = tmp_path_factory.mktemp("workplace")
    values = tiny.recipe_values(tiny.write_llama(place / "llama"), tiny.write_questions(place / "q.jsonl"))
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert cli.run(["train", str(place / "recipe.yaml"), "--output", str(place / "run")]) == 0
    return place


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from rankfold.cli import run; run(['--help']); print([m for m in sys.modules if m in "
    code += "('torch', 'transformers', 'numpy', 'pydantic')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
    times = []
    for _ in range(3):
        # The processor time, since other tests may run beside this one.
        before = os.times()
        subprocess.run([sys.executable, "-m", "rankfold", "--help"], capture_output=True, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "command",
    [
        *("train", "eval", "generate", "inspect", "merge", "squeeze", "compress", "combine", "lorahub", "similar"),
        *("transfer", "train-generator", "generate-adapter", "quantize", "serve", "audit", "soften", "compare"),
        *("export", "import", "methods", "skills"),
    ],
)
def test_every_command_shows_an_example(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capfd, command, "--help")
    assert code == 0
    assert f"Example: rankfold {command}" in out


def test_train_reports(workplace: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ("train", workplace / "recipe.yaml", "--set", "budget.steps=2", "--output", tmp_path / "run")
    code, out, err = run(capfd, *command, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["steps"] == 2
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    code, out, err = run(capfd, *command)
    assert (code, out) == (2, "")
    assert "holds a run already: add --resume" in err


def test_eval(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "eval", workplace / "run", "--json")
    assert code == 0
    scores = json.loads(out)
    report = json.loads((workplace / "run" / "report.json").read_text())
    assert scores["base"] == pytest.approx(report["before"], rel=1e-6)
    assert scores["adapter"] == pytest.approx(report["after"], rel=1e-6)
    code, out, _ = run(capfd, "eval", workplace / "recipe.yaml")
    assert code == 0
    assert "perplexity" in out
    assert "adapter" not in out


def test_generate(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        "generate",
        "--model",
        workplace / "llama",
        "--prompt",
        "1+2?",
        "--prompt",
        "3+3?",
        "--max-new-tokens",
        "3",
    )
    code, plain, _ = run(capfd, *command, "--json")
    assert code == 0
    assert [row["prompt"] for row in json.loads(plain)] == ["1+2?", "3+3?"]
    code, adapted, _ = run(capfd, *command, "--json", "--adapter", workplace / "run" / "adapter")
    assert code == 0
    assert adapted != plain
    hot = [run(capfd, *command, "--chat", "--temperature", "2", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]


def test_a_model_trained_in_full_is_measured_and_generates(
    workplace: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = ("method=full", "optimizer={name: apollo, rank: 4, lr: 0.01}", "budget.steps=4", "samples.count=1")
    settings = [part for change in changes for part in ("--set", change)]
    code, _, err = run(capfd, "train", workplace / "recipe.yaml", "--output", tmp_path / "run", *settings)
    assert (code, f"{tmp_path / 'run' / 'model'}" in err.replace("\n", "")) == (0, True)
    code, out, _ = run(capfd, "eval", tmp_path / "run", "--json")
    assert code == 0
    scores, report = json.loads(out), json.loads((tmp_path / "run" / "report.json").read_text())
    assert scores.keys() == {"base", "model"}
    assert scores["base"]["loss"] == pytest.approx(report["before"]["loss"], rel=1e-6)
    assert scores["model"]["loss"] == pytest.approx(report["after"]["loss"], rel=1e-6)
    prompt = ("--prompt", report["samples"][0]["prompt"], "--max-new-tokens", "4")
    code, out, _ = run(capfd, "generate", "--model", tmp_path / "run" / "model", *prompt, "--json")
    assert code == 0
    assert json.loads(out)[0]["answer"] == report["samples"][0]["after"]


def test_merge_writes_a_model_that_transformers_loads(
    workplace: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rankfold

    adapter = workplace / "run" / "adapter"
    command = ("merge", "--model", workplace / "llama", "--adapter", adapter, "--output", tmp_path / "merged")
    assert run(capfd, *command)[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForCausalLM.from_pretrained(workplace / "llama")
    rankfold.load(adapted, adapter)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("1+2?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)
        with rankfold.using(adapted, None):
            assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)
    code, _, err = run(capfd, *command)
    assert (code, "is not empty" in err) == (2, True)


def test_export_and_import(workplace: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, adapter = ("--model", workplace / "llama"), workplace / "run" / "adapter"
    assert run(capfd, "export", *base, "--adapter", adapter, "--output", tmp_path / "peft")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    command = ("import", *base, "--peft", tmp_path / "peft", "--output", tmp_path / "back", "--name", "back")
    assert run(capfd, *command)[0] == 0
    ours, back = (load_file(p / "adapter.safetensors") for p in (adapter, tmp_path / "back"))
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)


def test_a_classifier_is_merged_with_its_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    values = tiny.recipe_values(tiny.write_bert(tmp_path / "bert"), tiny.write_questions(tmp_path / "q.jsonl"))
    values["data"] |= {"format": "classification", "columns": {"text": "question", "label": "kind"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert run(capfd, "train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")[0] == 0
    base = ("--model", tmp_path / "bert", "--adapter", tmp_path / "run" / "adapter")
    recipe = ("--recipe", tmp_path / "run" / "recipe.yaml")
    scores = json.loads(run(capfd, "eval", tmp_path / "run", "--json")[1])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert scores["adapter"] == pytest.approx(report["after"], rel=1e-6)
    assert run(capfd, "merge", *base, *recipe, "--output", tmp_path / "merged")[0] == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "high", 1: "low"}


def test_inspect_needs_no_model(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "inspect", workplace / "run" / "adapter")
    assert code == 0
    assert "lora(rank=4" in out
    assert "4,096 in 28 tensors" in out
    assert "q_proj" in out
    described = json.loads(run(capfd, "inspect", workplace / "run" / "adapter", "--json")[1])
    assert described["method"]["rank"] == 4
    assert len(described["tensors"]) == 28


def test_methods(capfd: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(run(capfd, "methods", "--json")[1])
    assert {"lora", "pissa", "lora+"} <= {entry["slug"] for entry in entries}
    axis = json.loads(run(capfd, "methods", "--axis", "inits", "--json")[1])
    assert {entry["axis"] for entry in axis} == {"inits"}
    code, out, _ = run(capfd, "methods", "--axis", "deltas")
    assert code == 0
    assert "dora" in out
    assert "pissa" not in out


BAD: list[tuple[list[str], str]] = [
    (["trian"], "No such command 'trian'. Did you mean 'train', 'transfer'?"),
    (["train"], "Missing argument 'RECIPE.yaml'"),
    (["train", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
    (["train", "RECIPE", "--set", "method.rank=0"], "method: lora: rank"),
    (["train", "RECIPE", "--set", "optimizer.lr=fast"], "optimizer.lr: input should be a valid number"),
    (["train", "RECIPE", "--set", "targets=[nope]"], "nope"),
    (["train", "RECIPE", "--wrong"], "No such option: --wrong"),
    (["eval", "RECIPE", "--adapter", "nowhere"], "--adapter: no such folder: nowhere"),
    (["generate", "--model", "./nowhere", "--prompt", "x"], "model.path: no such file or directory: ./nowhere"),
    (["generate", "--model", "MODEL", "--prompt", "x", "--dtype", "int3"], "--model: dtype: input should be 'float32'"),
    (["generate", "--model", "MODEL", "--prompt", "x", "--temperature", "-1"], "Invalid value for '--temperature'"),
    (["generate", "--model", "MODEL", "--prompt", "x", "--adapter", "MODEL"], "holds no adapter.safetensors"),
    (["inspect", "./nowhere"], "there is no folder './nowhere'"),
    (["merge", "--model", "MODEL", "--adapter", "x"], "Missing option '--output'"),
    (["import", "--model", "MODEL", "--peft", "MODEL", "--output", "x"], "adapter_config.json"),
    (["methods", "--axis", "nope"], "--axis: there is no 'nope'; there are: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: "-".join(v[:3]) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(
    workplace: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    real = {"RECIPE": str(workplace / "recipe.yaml"), "MODEL": str(workplace / "llama")}
    extra = ["--output", str(tmp_path / "run")] if "RECIPE" in arguments and arguments[0] == "train" else []
    code, out, err = run(capfd, *(real.get(a, a) for a in arguments), *extra)
    said = [line for line in err.splitlines() if line.startswith("rankfold: ")]
    assert (code, len(said), out) == (2, 1, "")
    assert message in said[0]
    assert "Traceback" not in err


def test_debug_shows_the_traceback(workplace: Path, tmp_path: Path) -> None:
    from rankfold.errors import RankfoldError

    with pytest.raises(RankfoldError):
        cli.run(["train", "nowhere.yaml", "--debug"])


def test_an_unexpected_error_is_one_line_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfold.train import recipe_file

    def broken(*arguments: Any) -> None:
        raise KeyError("inner\nworkings")

    monkeypatch.setattr(recipe_file, "read_recipe", broken)
    code, _, err = run(capfd, "train", "x.yaml")
    assert code == 1
    assert err.splitlines() == ["rankfold: unexpected KeyError: 'inner\\nworkings' (add --debug for the traceback)"]


def test_a_missing_extra_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: Any, **options: Any) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(cli, "app", absent)
    code, _, err = run(capfd, "train", "x.yaml")
    assert code == 2
    assert "needs datasets, which is not installed; try: pip install 'rankfold[train]'" in err


def test_ctrl_c_tells_how_to_go_on(workplace: Path, tmp_path: Path) -> None:
    """In a process of its own, as a terminal sends it."""
    import signal

    arguments = [
        "train",
        str(workplace / "recipe.yaml"),
        "--set",
        "budget.steps=2000",
        "--output",
        str(tmp_path / "run"),
    ]
    arguments += ["--set", "evaluate.steps=2000"]
    with subprocess.Popen([sys.executable, "-m", "rankfold", *arguments], stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("rankfold: stopped at step ")
    assert err.splitlines()[-1].endswith("go on with the same command and --resume")
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) >= 1
