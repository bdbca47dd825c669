"""Rows and their encoding: what the model sees, and where the loss is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfold.errors import RankfoldError
from rankfold.train import data as data_module
from rankfold.train import rows
from rankfold.train.encode import IGNORED
from rankfold.train.recipe import Data
from rankfold.train.recipe_file import validate
from tests.train import tiny

TOKENIZER = tiny.tokenizer()


def spec(path: Path, format: str, **changes: Any) -> Data:
    return Data.model_validate({"path": str(path), "format": format, **changes})


def prepare(data: Data, labels: tuple[str, ...] | None = None) -> data_module.Prepared:
    recipe = validate({"model": "x", "data": data.model_dump(), "method": "lora", "budget": {"steps": 1}})
    return data_module.prepare(recipe, rows.read_split(data, 0), tiny.tokenizer(), labels)


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def texts(row: dict[str, list[int]]) -> tuple[str, str]:
    """All of a row, and the part that carries loss."""
    return TOKENIZER.decode(row["input_ids"]), TOKENIZER.decode([t for t in row["labels"] if t != IGNORED])


# ---- reading


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder", "jsonl.gz"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": [f"row {i}" for i in range(10)], "n": range(10)})
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "jsonl" | "jsonl.gz":
            frame.to_json(path, orient="records", lines=True)
        case "json":
            frame.to_json(path, orient="records")
        case "csv" | "tsv":
            frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
        case "parquet":
            frame.to_parquet(path)
        case "folder":
            path.mkdir()
            frame[:5].to_json(path / "a.jsonl", orient="records", lines=True)
            frame[5:].to_json(path / "b.jsonl", orient="records", lines=True)
            path.joinpath("README.rst").write_text("not data")
    read = rows.read_rows(spec(path, "text"), str(path), "train", "data.path")
    assert read["text"] == frame["text"].tolist()


def test_text_files_are_read_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\nstill one\n\ntwo\n\nthree\n")
    assert rows.read_rows(spec(path, "text"), str(path), "train", "k")["text"] == ["one\nstill one", "two", "three\n"]


def test_options_go_to_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text;n\ncaf\xe9;1\nth\xe9;2\n".encode("latin-1"))
    data = spec(path, "text", read={"encoding": "latin-1", "delimiter": ";"})
    assert rows.read_rows(data, str(path), "train", "k")["text"] == ["café", "thé"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", "x", "holds no data file; known are .jsonl"),
        ("rows.jsonl", '{"a": 1', "data.path: cannot read"),
        ("missing.jsonl", None, "data.path: no such file or directory"),
        ("package:no-such-distribution/x", None, "no-such-distribution is not installed; try: pip install"),
        ("package:pytest/no/such.file", None, "pytest .* has no no/such.file"),
        ("cache:no/such", None, "data.path: nothing at cache:no/such"),
    ],
)
def test_data_that_cannot_be_read(
    tmp_path: Path, name: str, content: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(RankfoldError, match=message):
        rows.read_split(spec(Path(name), "text"), 0)


def test_the_cut_is_seeded_and_apart(questions: Path) -> None:
    data = spec(questions, "text", held_out={"fraction": 0.25})
    first, again, other = (rows.read_split(data, seed) for seed in (0, 0, 1))
    everything = rows.read_rows(data, str(questions), "train", "k")
    assert (len(first[0]), len(first[1])) == (45, 15)
    assert [part.to_list() for part in first] == [part.to_list() for part in again]
    assert first[1].to_list() != other[1].to_list()
    key = lambda row: row["question"]  # noqa: E731
    assert sorted(first[0].to_list() + first[1].to_list(), key=key) == sorted(everything.to_list(), key=key)


def test_a_held_out_file_and_limits(tmp_path: Path, questions: Path) -> None:
    held = write(tmp_path / "held.jsonl", [{"question": "?", "answer": "!", "kind": "high"}] * 5)
    train, held_out = rows.read_split(spec(questions, "text", limit=10, held_out={"path": str(held), "limit": 3}), 0)
    assert (len(train), len(held_out)) == (10, 3)
    assert set(held_out["question"]) == {"?"}


# ---- encoding


def test_prompts_are_masked_and_completions_end(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"q": "a|b", "a": "{x} ü"}] * 4)
    columns = {"prompt": "Q: {q}\nA:", "completion": " {a}"}
    prepared = prepare(spec(path, "prompt-completion", columns=columns))
    assert texts(prepared.train[0]) == ("Q: a|b\nA: {x} ü<eos>", " {x} ü<eos>")
    assert (prepared.samples[0].prompt, prepared.samples[0].answer) == ("Q: a|b\nA:", " {x} ü")


def test_too_long_rows_are_cut_and_those_without_an_answer_left_out(tmp_path: Path) -> None:
    lines = [{"prompt": "x" * n, "completion": "yes"} for n in (2, 6, 20, 2, 6, 20)]
    path = write(tmp_path / "rows.jsonl", lines)
    data = spec(path, "prompt-completion", max_length=8, held_out={"path": str(path)})
    prepared = prepare(data)
    assert [texts(row) for row in prepared.train][:2] == [("xxyes<eos>", "yes<eos>"), ("xxxxxxye", "ye")]
    assert (len(prepared.train), prepared.dropped) == (4, 2)
    with pytest.raises(RankfoldError, match=r"data.path: no row has an answer within data.max_length \(2 tokens\)"):
        prepare(data.model_copy(update={"max_length": 2}))


def test_chat_trains_on_the_assistant_alone(tmp_path: Path) -> None:
    turns = [("system", "S"), ("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D")]
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 4)
    prepared = prepare(spec(path, "chat"))
    whole = "<|system|>S<eos><|user|>a<eos><|assistant|>B<eos><|user|>c<eos><|assistant|>D<eos>"
    assert texts(prepared.train[0]) == (whole, "B<eos>D<eos>")
    sample = prepared.samples[0]
    assert (sample.prompt, sample.shown, sample.answer) == (whole[: -len("D<eos>")], "c", "D")
    assert texts(prepare(spec(path, "chat", train_on="all")).train[0]) == (whole, whole)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "B"}]},
            {"messages": "conversations"},
        ),
        ({"question": "a", "answer": "B"}, {"prompt": "question", "completion": "answer"}),
        ({"prompt": "a", "completion": "B"}, {}),
    ],
    ids=["sharegpt", "columns", "plain"],
)
def test_chat_from_other_columns(tmp_path: Path, row: dict[str, Any], columns: dict[str, str]) -> None:
    path = write(tmp_path / "rows.jsonl", [row] * 4)
    prepared = prepare(spec(path, "chat", columns=columns))
    assert texts(prepared.train[0]) == ("<|user|>a<eos><|assistant|>B<eos>", "B<eos>")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "CHAT_TEMPLATE", "{{ messages | length }}" + tiny.CHAT_TEMPLATE)
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(RankfoldError, match=r"data\.train_on: .*rewrites earlier turns"):
        prepare(spec(path, "chat"))


def test_text_is_packed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": letter * 5} for letter in "abcd"])
    prepared = prepare(spec(path, "text", max_length=8, held_out={"path": str(path)}))
    blocks = [TOKENIZER.decode(row["input_ids"]) for row in prepared.train]
    assert "".join(blocks) == "aaaaa<eos>bbbbb<eos>ccccc<eos>ddddd<eos>"
    assert [len(row["input_ids"]) for row in prepared.train] == [8, 8, 8]
    assert all(row["input_ids"] == row["labels"] for row in prepared.train)


def test_classes(questions: Path) -> None:
    data = spec(questions, "classification", columns={"text": "question", "label": "kind"})
    labels = data_module.class_names(data, *rows.read_split(data, 0))
    assert labels == ("high", "low")
    row = prepare(data, labels).train[0]
    a = TOKENIZER.decode(row["input_ids"]).split("+")[0]
    assert labels[row["labels"]] == ("high" if int(a) >= 5 else "low")
    with pytest.raises(RankfoldError, match=r"data\.labels: a row has the label '(high|low)'; listed are: x, y"):
        prepare(data, ("x", "y"))


def test_seq2seq_keeps_prompt_and_answer_apart(questions: Path) -> None:
    prepared = prepare(spec(questions, "seq2seq", columns={"prompt": "Add: {question}", "completion": "answer"}))
    row = prepared.train[0]
    assert TOKENIZER.decode(row["input_ids"]).startswith("Add: ")
    assert TOKENIZER.decode(row["labels"]).isdecimal()


@pytest.mark.parametrize("source", ["folder", "arrays"])
def test_pictures(tmp_path: Path, source: str) -> None:
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    values = np.repeat(np.arange(8, dtype=np.uint8) * 30, 100).reshape(8, 10, 10)
    if source == "arrays":
        path = tmp_path / "pictures.npz"
        np.savez(path, image=values, label=np.arange(8) % 2)
        names = ("0", "1")
    else:
        path = tmp_path / "pictures"
        names = ("cat", "dog")
        for i, picture in enumerate(values):
            folder = path / names[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i}.png")
    data = spec(path, "image-classification", image_size=28)
    parts = rows.read_split(data, 0)
    assert data_module.class_names(data, *parts) == names
    recipe = validate({"model": "x", "data": data.model_dump(), "method": "lora", "budget": {"steps": 1}})
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    prepared = data_module.prepare(recipe, parts, processor, names)
    batch = prepared.collate([prepared.train[i] for i in range(len(prepared.train))])
    assert batch["pixel_values"].shape == (7, 3, 28, 28)
    # The grey value tells which picture it is, and that tells its class.
    number = (batch["pixel_values"].mean((1, 2, 3)) * 255 / 30).round().long()
    assert torch.equal(number % 2, batch["labels"])


def test_batches_are_padded_without_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "x" * n} for n in (1, 4)])
    prepared = prepare(spec(path, "prompt-completion", held_out={"path": str(path)}))
    batch = prepared.collate([prepared.train[0], prepared.train[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist()[3:] == [IGNORED] * 3


@pytest.mark.parametrize(
    ("format", "columns", "message"),
    [
        ("prompt-completion", {"prompt": "nope"}, "data.columns.prompt: .*'nope'; it has: question, answer, kind"),
        ("prompt-completion", {"prompt": "Q {qestion}"}, "data.columns.prompt: .*'qestion'"),
        ("prompt-completion", {}, "data.columns.prompt: .*'prompt'"),
        ("chat", {}, "data.columns: format chat needs messages"),
        ("text", {"text": "{question} {no}"}, "data.columns.text: .*'no'"),
    ],
)
def test_columns_that_are_not_there(questions: Path, format: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises(RankfoldError, match=message):
        prepare(spec(questions, format, columns=columns))
