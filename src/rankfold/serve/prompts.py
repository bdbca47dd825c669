"""What is asked as token ids: encoded texts and chats, and how long answers to them may be."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rankfold.serve.engine import Engine
from rankfold.serve.errors import ApiError


class Prompts:
    """Encodes in one thread of its own: the server goes on answering, and no two threads use the tokenizer's state."""

    def __init__(self, engine: Engine, tokenizer: Any, max_prompt: int | None, max_tokens: int):
        self._tokenizer, self._max_prompt, self._max_tokens = tokenizer, max_prompt, max_tokens
        context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
        capacity = len(engine.pool) * engine.pool.block
        self._most = min(context or capacity, capacity)
        self._unasked = min(context or capacity, capacity // 2)  # the other half of the pool is for everybody else
        own = tokenizer.eos_token_id
        self.ends = engine.ends | (frozenset() if own is None else {own})
        self._thread = ThreadPoolExecutor(1, "rankfold-encoding")

    async def of_texts(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        def encode() -> list[list[int]]:
            return [p if isinstance(p, list) else self._tokenizer(p)["input_ids"] for p in prompts]

        encoded = await self._apart(encode)
        for prompt in encoded:
            self._check(prompt, "prompt")
        return encoded

    async def of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The chat as the model's template writes it. Raises ApiError where it has none, or refuses the chat."""
        if not self._tokenizer.chat_template:
            raise ApiError(
                400, "the model's tokenizer has no chat template: ask /v1/completions", code="no_chat_template"
            )

        def encode() -> list[int]:
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates refuse with errors of any type
                raise ApiError(400, f"the model's chat template refuses it: {error}", param="messages") from error
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]

        encoded = await self._apart(encode)
        self._check(encoded, "messages")
        return encoded

    async def _apart(self, do: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    def text(self, prompt: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _check(self, prompt: Sequence[int], param: str) -> None:
        most = self._most - 1 if self._max_prompt is None else min(self._max_prompt, self._most - 1)
        if len(prompt) > most:
            message = f"the prompt has {len(prompt)} tokens; this server takes up to {most}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def length(self, prompt: Sequence[int], asked: int | None, param: str) -> int:
        """The most tokens that the answer may have: as many as were asked for, else what the server can give."""
        if asked is None:
            return max(1, min(self._max_tokens, self._unasked - len(prompt)))
        if asked > self._max_tokens:
            message = f"{asked} is more than the {self._max_tokens} tokens that this server gives an answer"
            raise ApiError(400, message, param=param)
        return asked
