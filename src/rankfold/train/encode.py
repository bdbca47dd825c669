"""From rows to model inputs: one encoder per format of a recipe's data."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.train.recipe import COLUMNS, Data

IGNORED = -100  # the label that cross-entropy leaves out
Row = dict[str, Any]
Field = Callable[[Row], Any]
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the roles


def fields(data: Data, columns: Sequence[str]) -> dict[str, Field]:
    """How to read each field of the format from a row with these `columns`.

    A mapping such as `"Question: {question}"` is a template over columns; any other is the name of a column.
    Raises RankfoldError for a column that is not there.
    """
    required, optional = COLUMNS[data.format]
    wanted = [f for f in (*required, *optional) if f in required or f in data.columns or f in columns]
    if data.format == "chat":
        wanted = _chat_fields(data, wanted)
    return {field: _field(data.column(field), columns, f"data.columns.{field}") for field in wanted}


def _chat_fields(data: Data, wanted: list[str]) -> list[str]:
    turns = [f for f in wanted if f != "messages"]
    if "messages" in data.columns or ("messages" in wanted and not {"prompt", "completion"} & set(data.columns)):
        return ["messages"]
    if {"prompt", "completion"} <= set(turns):
        return turns
    raise RankfoldError("data.columns: format chat needs messages (a list of turns), or prompt and completion")


def _field(source: str, columns: Sequence[str], key: str) -> Field:
    names = re.findall(r"\{(\w+)\}", source) or [source]
    missing = [name for name in names if name not in columns]
    if missing:
        raise RankfoldError(f"{key}: the data has no column {missing[0]!r}; it has: {', '.join(columns)}")
    if names == [source]:
        return lambda row: row[source]
    return lambda row: re.sub(r"\{(\w+)\}", lambda match: str(row[match[1]]), source)


def turns(row: Row, read: dict[str, Field]) -> list[dict[str, str]]:
    """The chat of a row as `[{"role": ..., "content": ...}, ...]`; ShareGPT's from/value spelling is understood."""
    if "messages" in read:
        messages = [
            {"role": _SPEAKERS.get(role, role), "content": turn.get("content", turn.get("value"))}
            for turn in read["messages"](row)
            for role in [turn.get("role", turn.get("from"))]
        ]
        if not messages or any(not isinstance(value, str) for turn in messages for value in turn.values()):
            raise RankfoldError("data.columns.messages: expected turns with role and content (or from and value)")
        return messages
    system = [{"role": "system", "content": str(read["system"](row))}] if "system" in read else []
    user = {"role": "user", "content": str(read["prompt"](row))}
    return [*system, user, {"role": "assistant", "content": str(read["completion"](row))}]


def chat_text(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The chat written with the tokenizer's template."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RankfoldError("data.format: the model's tokenizer has no chat template; use prompt-completion instead")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise RankfoldError(f"data.columns: the model's chat template refuses a row's turns: {error}") from None


def _chat_spans(tokenizer: Any, messages: list[dict[str, str]], train_on: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character ranges that carry the loss."""
    text = chat_text(tokenizer, messages)
    if train_on == "all":
        return text, [(0, len(text))]
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = chat_text(tokenizer, messages[:i], add_generation_prompt=True)
        through = chat_text(tokenizer, messages[: i + 1])
        if not (text.startswith(before) and text.startswith(through)):
            raise RankfoldError(
                "data.train_on: the model's chat template rewrites earlier turns, so the assistant's cannot be told "
                "apart; use train_on: all, or one turn per row"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _encode_spans(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], max_length: int, special: bool
) -> dict[str, list[int]]:
    """`input_ids` and `labels`, where labels are the ids of the tokens that begin inside a span, else IGNORED."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if end > start and any(a <= start < b for a, b in spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def causal_row(row: Row, read: dict[str, Field], data: Data, tokenizer: Any) -> dict[str, list[int]]:
    """One row of format chat or prompt-completion: the prompt is seen, the answer carries the loss."""
    if data.format == "chat":
        text, spans = _chat_spans(tokenizer, turns(row, read), data.train_on)
        return _encode_spans(tokenizer, text, spans, data.max_length, special=False)
    prompt, completion = str(read["prompt"](row)), str(read["completion"](row))
    text, span = prompt + completion, (len(prompt), len(prompt) + len(completion))
    encoded = _encode_spans(tokenizer, text, [span], data.max_length, special=True)
    eos = tokenizer.eos_token_id
    if eos is not None and len(encoded["input_ids"]) < data.max_length:
        if encoded["input_ids"][-1:] == [eos]:  # some tokenizers close every text themselves
            encoded["labels"][-1] = eos
        else:
            encoded["input_ids"].append(eos)
            encoded["labels"].append(eos)
    return encoded


def packed_blocks(texts: Sequence[str], data: Data, tokenizer: Any) -> Iterator[dict[str, list[int]]]:
    """Texts one after the other, an end-of-text token behind each, cut into blocks of `max_length` tokens."""
    stream: list[int] = []
    for ids in tokenizer(list(texts))["input_ids"]:
        stream += ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            stream.append(tokenizer.eos_token_id)
    for start in range(0, len(stream), data.max_length):
        block = stream[start : start + data.max_length]
        yield {"input_ids": block, "labels": list(block)}


def token_blocks(text: str, tokenizer: Any, length: int = 128, limit: int = 32) -> list[Any]:
    """A text as blocks of `length` token ids, (length,) each, the first `limit` of them; at least two."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if len(ids) < 2 * length:
        raise RankfoldError(f"the text has {len(ids):,} tokens, and two blocks of {length} take {2 * length:,}")
    return list(ids[: len(ids) // length * length].split(length))[:limit]


def seq2seq_row(row: Row, read: dict[str, Field], data: Data, tokenizer: Any) -> dict[str, list[int]]:
    """The prompt for the encoder, the completion as labels for the decoder; each cut to `max_length`."""
    options = {"truncation": True, "max_length": data.max_length}
    source = tokenizer(str(read["prompt"](row)), **options)["input_ids"]
    return {"input_ids": source, "labels": tokenizer(text_target=str(read["completion"](row)), **options)["input_ids"]}


def class_row(row: Row, read: dict[str, Field], data: Data, tokenizer: Any, labels: Sequence[str]) -> dict[str, Any]:
    """A text (or a pair of texts) and the index of its class."""
    pair = str(read["text_pair"](row)) if "text_pair" in read else None
    encoded = tokenizer(str(read["text"](row)), pair, truncation=True, max_length=data.max_length)
    return {"input_ids": encoded["input_ids"], "labels": class_index(read["label"](row), labels)}


def class_index(label: Any, labels: Sequence[str]) -> int:
    if str(label) not in labels:
        raise RankfoldError(f"data.labels: a row has the label {label!r}; listed are: {', '.join(labels)}")
    return labels.index(str(label))
