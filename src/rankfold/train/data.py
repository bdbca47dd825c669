"""The data of a run, ready for a data loader: encoded training and held-out rows, a collator, and samples to show."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.train import encode
from rankfold.train.recipe import Data, Recipe


@dataclass(frozen=True)
class Sample:
    """One held-out row to show before and after: `prompt` is what the model sees, `shown` what a reader sees of it,
    `answer` what the data says, `index` the number of the row."""

    prompt: str
    shown: str
    answer: str
    index: int


@dataclass(frozen=True)
class Prepared:
    """`train` and `held_out` yield model inputs with `labels`; `collate` makes a batch (tensors) of several."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    samples: tuple[Sample, ...]
    dropped: int  # training rows without a token that carries the loss


def class_names(data: Data, *parts: datasets.Dataset) -> tuple[str, ...]:
    """The names of the classes, in the order of their indices: the recipe's, else those that the rows hold."""
    column = data.column("label")
    for rows in parts:
        if column not in rows.column_names:
            raise RankfoldError(
                f"data.columns.label: the data has no column {column!r}; it has: {', '.join(rows.column_names)}"
            )
    if data.labels is not None:
        return data.labels
    feature = parts[0].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    found = {value for rows in parts for value in rows.unique(column)}
    if len(found) < 2:
        raise RankfoldError(f"data.columns.label: column {column!r} holds {len(found)} class; at least 2 are needed")
    return tuple(str(value) for value in sorted(found, key=lambda v: (isinstance(v, str), v)))


def prepare(
    recipe: Recipe, rows: tuple[datasets.Dataset, datasets.Dataset], processor: Any, labels: Sequence[str] | None
) -> Prepared:
    """Encode `rows` (training, held-out) as the recipe says. `processor` is the model's tokenizer or image processor,
    `labels` the class names of a classification task."""
    data = recipe.data
    read = encode.fields(data, rows[0].column_names)
    if data.format == "image-classification":
        return _pictures(recipe, rows, processor, read, labels or ())
    rows = (_with_class_names(rows[0], data), _with_class_names(rows[1], data))
    with _temporary_files():
        encoded = [_encode(part, data, processor, read, labels or ()) for part in rows]
        kept = [part.filter(_carries_loss, input_columns="labels") for part in encoded]
    for part, key in zip(kept, ("data.path", "data.held_out"), strict=True):
        if len(part) == 0:
            raise RankfoldError(f"{key}: no row has an answer within data.max_length ({data.max_length} tokens)")
    if processor.pad_token_id is None:
        processor.pad_token = processor.eos_token
    samples = _samples(recipe, rows[1], processor, read)
    return Prepared(kept[0], kept[1], _collator(processor), samples, len(encoded[0]) - len(kept[0]))


def _with_class_names(rows: datasets.Dataset, data: Data) -> datasets.Dataset:
    """Rows whose class column holds names, where the source gave numbers with a table of names."""
    column = data.column("label")
    feature = rows.features.get(column)
    if data.format not in ("classification", "image-classification") or not isinstance(feature, datasets.ClassLabel):
        return rows
    names = [feature.int2str(value) for value in rows[column]]
    return rows.remove_columns(column).add_column(column, names)


def _encode(
    rows: datasets.Dataset, data: Data, tokenizer: Any, read: dict[str, encode.Field], labels: Sequence[str]
) -> datasets.Dataset:
    def batch(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        each = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if data.format == "text":
            encoded = list(encode.packed_blocks([str(read["text"](row)) for row in each], data, tokenizer))
        elif data.format == "classification":
            encoded = [encode.class_row(row, read, data, tokenizer, labels) for row in each]
        elif data.format == "seq2seq":
            encoded = [encode.seq2seq_row(row, read, data, tokenizer) for row in each]
        else:
            encoded = [encode.causal_row(row, read, data, tokenizer) for row in each]
        return {key: [row[key] for row in encoded] for key in ("input_ids", "labels")}

    return rows.map(batch, batched=True, remove_columns=rows.column_names, desc="encode")


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    """Encoded rows go to files that end with the process. The cache on disk would never be read again: its key is a
    hash of the tokenizer's pickle, which differs from run to run."""
    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()


def _carries_loss(labels: int | list[int]) -> bool:
    """Whether an encoded row trains anything: a class, or a token after the first (which nothing predicts)."""
    return isinstance(labels, int) or any(label != encode.IGNORED for label in labels[1:])


def _collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Pads inputs on the right with the padding token (masked) and labels with IGNORED. Shapes: (rows, longest)."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    tokens, classes = DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        kind = classes if isinstance(rows[0]["labels"], int) else tokens
        return dict(kind([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]))

    return collate


def _samples(
    recipe: Recipe, rows: datasets.Dataset, tokenizer: Any, read: dict[str, encode.Field]
) -> tuple[Sample, ...]:
    return tuple(
        Sample(*_shown(rows[index], recipe.data, tokenizer, read), index)
        for index in range(min(recipe.samples.count, len(rows)))
    )


def _shown(row: encode.Row, data: Data, tokenizer: Any, read: dict[str, encode.Field]) -> tuple[str, str, str]:
    """What the model sees of a row, what a reader sees, and the answer that the data gives."""
    if data.format == "chat":
        messages = encode.turns(row, read)
        last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
        prompt = encode.chat_text(tokenizer, messages[:last], add_generation_prompt=True)
        return prompt, messages[max(last - 1, 0)]["content"], messages[last]["content"]
    if data.format == "text":
        words = str(read["text"](row)).split(" ")
        half = max(1, min(len(words) // 2, 40))
        prompt, answer = " ".join(words[:half]), " ".join(words[half : half + 40])
    elif data.format == "classification":
        prompt, answer = str(read["text"](row)), str(read["label"](row))
    else:
        prompt, answer = str(read["prompt"](row)), str(read["completion"](row))
    return prompt, prompt, answer


def _pictures(
    recipe: Recipe,
    rows: tuple[datasets.Dataset, datasets.Dataset],
    processor: Any,
    read: dict[str, encode.Field],
    labels: Sequence[str],
) -> Prepared:
    """Pictures are resized and normalised as they are read, so that a large folder never sits in memory."""
    from transformers import default_data_collator

    train, held_out = (_with_class_names(part, recipe.data) for part in rows)

    def batch(columns: dict[str, list[Any]]) -> dict[str, Any]:
        each = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        pixels = processor([read["image"](row).convert("RGB") for row in each], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": [encode.class_index(read["label"](row), labels) for row in each]}

    column = recipe.data.column("label")
    samples = tuple(
        Sample("", f"held-out picture {index}", str(answer), index)
        for index, answer in enumerate(held_out[column][: recipe.samples.count])
    )
    return Prepared(train.with_transform(batch), held_out.with_transform(batch), default_data_collator, samples, 0)
