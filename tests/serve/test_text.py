"""Tokens as text: what goes out while they come is, put together, the whole; stop strings never show."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rankfold.serve.text import Decoder, Stops, spelled
from tests.train import tiny

TOKENIZER = tiny.tokenizer()


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words that begin with a mark, and bytes for what is no word."""
    pieces = ["<unk>", "<eos>", "▁Paris", "▁is", "n't", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")


def pieces(tokens: list[int], tokenizer: Any = TOKENIZER, prompt: tuple[int, ...] = ()) -> list[str]:
    decoder = Decoder(tokenizer, prompt)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


def test_characters_come_whole() -> None:
    text = "Grüße 🙂 aus 東京"
    came = pieces(TOKENIZER(text)["input_ids"])
    assert "".join(came) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(came)
    assert [piece for piece in came if piece] == list(text)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_are_the_whole_of_any_tokens(tokens: list[int]) -> None:
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces(tokens)) == whole


@given(st.text(max_size=30))
def test_text_comes_as_it_is(text: str) -> None:
    assert "".join(pieces(TOKENIZER(text, add_special_tokens=False)["input_ids"])) == TOKENIZER.decode(
        TOKENIZER(text)["input_ids"], skip_special_tokens=True
    )


def test_a_word_behind_a_prompt_keeps_its_space() -> None:
    tokenizer = sentencepiece()
    paris, is_, not_ = 2, 3, 4
    assert tokenizer.decode([is_, not_]) == "isn't"
    assert "".join(pieces([is_, not_], tokenizer, (paris,))) == " isn't"
    assert "".join(pieces([paris, is_], tokenizer)) == "Paris is"


def test_bytes_of_a_word_vocabulary() -> None:
    tokenizer = sentencepiece()
    tokens = [2, *(5 + byte for byte in " 🙂".encode())]
    assert "".join(pieces(tokens, tokenizer)) == "Paris 🙂"
    assert b"".join(spelled(tokenizer, token) for token in tokens) == " Paris 🙂".encode()


def test_a_prompt_that_ends_within_a_character() -> None:
    first, second = TOKENIZER("é")["input_ids"]
    assert "".join(pieces([second, *TOKENIZER("a")["input_ids"]], prompt=(first,))).endswith("a")


def test_every_token_has_its_bytes() -> None:
    text = "a é🙂"
    assert b"".join(spelled(TOKENIZER, token) for token in TOKENIZER(text)["input_ids"]) == text.encode()
    assert spelled(TOKENIZER, TOKENIZER.eos_token_id) == b"<eos>"


def cut(text: list[str], stops: list[str]) -> tuple[list[str], bool]:
    finder, out = Stops(stops), []
    for piece in text:
        certain, stopped = finder.push(piece)
        out.append(certain)
        if stopped:
            return out, True
    return [*out, finder.flush()], False


@pytest.mark.parametrize(
    ("text", "stops", "out", "stopped"),
    [
        ("hello END more", ["END"], "hello ", True),
        ("hello EN", ["END"], "hello EN", False),
        ("aab", ["ab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("xyz", [], "xyz", False),
        ("one\n\ntwo", ["two", "\n\n"], "one", True),
        ("abcd", ["abcd", "c"], "ab", True),  # the one that is complete first, however the text comes
        ("STOP", ["STOP"], "", True),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_stop_strings(text: str, stops: list[str], out: str, stopped: bool, size: int) -> None:
    came, ended = cut([text[i : i + size] for i in range(0, len(text), size)], stops)
    assert ("".join(came), ended) == (out, stopped)


def test_no_more_is_held_back_than_could_be_a_stop() -> None:
    assert cut(list("abEND"), ["END"])[0] == ["a", "b", "", "", ""]
    assert cut(list("EEx"), ["END"])[0] == ["", "E", "Ex", ""]


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_cuts_do_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    some = [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    came, ended = cut(some, stops)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    first = min(ends, default=None)
    longest = max((len(s) for s in stops if first and text[:first].endswith(s)), default=0)
    assert ended == bool(ends)
    assert "".join(came) == (text if first is None else text[: first - longest])
