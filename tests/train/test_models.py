"""Loading pretrained models: sources, new heads, the cache of converted files."""

import threading
from pathlib import Path

import pytest
import torch

from rankfold.errors import RankfoldError
from rankfold.train import models
from rankfold.train.places import cache_dir, locate
from rankfold.train.recipe import Model
from tests.train import tiny


def spec(path: Path | str, **changes: str) -> Model:
    return Model.model_validate({"path": str(path), **changes})


def test_a_directory(llama_dir: Path) -> None:
    loaded = models.load_model(spec(llama_dir, dtype="bfloat16"), "causal-lm")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.new_modules == ()
    assert loaded.processor.decode(loaded.processor("hi")["input_ids"]) == "hi"


def test_the_kind_of_generation_is_found(llama_dir: Path, t5_dir: Path) -> None:
    assert type(models.load_model(spec(llama_dir), None).model).__name__ == "LlamaForCausalLM"
    assert type(models.load_model(spec(t5_dir), None).model).__name__ == "T5ForConditionalGeneration"


def test_a_new_head_is_found_and_the_same_for_a_seed(bert_dir: Path) -> None:
    before = torch.get_rng_state()
    loaded = [
        models.load_model(spec(bert_dir), "sequence-classification", labels=["a", "b", "c"], seed=s) for s in (1, 1, 2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert loaded[0].new_modules == ("classifier",)
    assert loaded[0].model.config.id2label == {0: "a", 1: "b", 2: "c"}
    heads = [one.model.classifier.weight for one in loaded]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_for_other_classes_is_replaced(bert_dir: Path, tmp_path: Path) -> None:
    models.load_model(spec(bert_dir), "sequence-classification", labels=["a", "b", "c"]).model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    same = models.load_model(spec(tmp_path), "sequence-classification", labels=["a", "b", "c"])
    assert same.new_modules == ()
    other = models.load_model(spec(tmp_path), "sequence-classification", labels=["x", "y"])
    assert other.new_modules == ("classifier",)
    assert other.model.classifier.out_features == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"model\.path: no such file or directory: \./nowhere"),
        ("cache:nowhere", r"model\.path: nothing at cache:nowhere"),
        ("package:torch/nowhere", r"model\.path: torch .* has no nowhere"),
        ("package:not-there/x", r"model\.path: .*not-there is not installed"),
        ("some-org/some-model", r"model\.path: cannot load some-org/some-model for causal-lm"),
    ],
)
def test_models_that_are_not_there(path: str, message: str) -> None:
    with pytest.raises(RankfoldError, match=message):
        models.load_model(spec(path), "causal-lm")


def test_a_model_that_does_not_fit_the_task(vit_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RankfoldError, match=r"model\.path: cannot load .* for causal-lm"):
        models.load_model(spec(vit_dir), "causal-lm")
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    with pytest.raises(RankfoldError, match=r"neither a directory nor a \.gguf file"):
        models.load_model(spec(file), "causal-lm")


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"some weights")
    made = []
    both_started = threading.Barrier(2)

    def convert(gguf: Path, target: Path) -> None:
        if len(made) < 2:
            both_started.wait(timeout=30)  # two processes at once, the worst case
        made.append(gguf)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_gguf", convert)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(models.gguf_directory(file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == models.gguf_directory(file)
    assert len(made) == 2
    assert [p.name for p in (cache_dir() / "models").iterdir()] == [results[0].name]
    assert (results[0] / "config.json").read_text() == "{}"
    file.write_bytes(b"other weights")
    assert models.gguf_directory(file) != results[0]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"some weights")

    def fail(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        models.gguf_directory(file)
    assert list((cache_dir() / "models").iterdir()) == []


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF, it says")
    with pytest.raises(RankfoldError, match=r"model\.path: cannot load .*model\.gguf"):
        models.load_model(spec(file), "causal-lm")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    (tmp_path / "cache" / "rankfold" / "model").mkdir(parents=True)
    assert locate("here", "key") == Path("here")
    assert locate("cache:model", "key") == tmp_path / "cache/rankfold/model"
    found = locate("package:pytest/pytest/__init__.py", "key")
    assert found is not None
    assert found.is_file()
    for hub_id in ("gpt2", "org/model", "meta/Llama-3.1-8B", "org/data_set.v2-en"):
        assert locate(hub_id, "key") is None
    for missing in ("a/b/c", "/x", "../x", "rows.jsonl", "org/rows.csv", "~nobody/x"):
        with pytest.raises(RankfoldError, match="key: no such file or directory"):
            locate(missing, "key")
