"""Tokens as text while they come: whole characters, stop strings that may still be coming, the bytes of a token."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders put in the place of bytes that are no character
_CONTEXT = 6  # tokens of a prompt's end that show how the first token of an answer is written


class Decoder:
    """The text of one answer, as its tokens come. A character whose bytes are not all there yet is waited for.

    Many tokenizers write a token otherwise at the start of a text, so each is decoded behind the ones before it, the
    first behind the end of the prompt. Together the pieces are what the tokenizer decodes all tokens to.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        if self._decode(0).endswith(_BROKEN):
            self._ids = []
        self._begin, self._end = 0, len(self._ids)  # the tokens before, whose text is known and gone out

    def _decode(self, begin: int, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def push(self, token: int) -> str:
        """The text that is whole with this token."""
        self._ids.append(token)
        text = self._decode(self._begin)
        return "" if text.endswith(_BROKEN) else self._give(text)

    def flush(self) -> str:
        """What is left, after the last token: bytes that never became a character."""
        return self._give(self._decode(self._begin))

    def _give(self, text: str) -> str:
        known = len(self._decode(self._begin, self._end))
        self._begin, self._end = self._end, len(self._ids)
        return text[known:]


class Stops:
    """Strings that end a text. What could be the start of one is held back until it is known not to be."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may go out now, and whether the text ends there: before the stop string that is complete first."""
        text = self._held + text
        found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        longest = max((len(s) for s in self._strings), default=0) - 1
        starts = range(max(0, len(text) - longest), len(text))
        cut = next((at for at in starts if any(s.startswith(text[at:]) for s in self._strings)), len(text))
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, after the last text."""
        held, self._held = self._held, ""
        return held


def spelled(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for, also where they are but a part of a character."""
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if one := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(one[1])
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _BROKEN not in text:
        return (" " + text if piece.startswith("▁") and not text.startswith(" ") else text).encode()
    letters = _letters()
    return bytes(letters[c] for c in piece) if all(c in letters for c in piece) else text.encode()


@cache
def _letters() -> dict[str, int]:
    """The byte that each letter stands for in the vocabularies of byte-level tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
