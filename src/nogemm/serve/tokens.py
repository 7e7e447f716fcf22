"""Tokens of requests: counted and held against the limits before anything waits for a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nogemm.models.texts import encode
from nogemm.serve.errors import ApiError, invalid
from nogemm.serve.requests import Message

T = TypeVar("T")
Row = dict[str, list[int]]


class Tokens:
    """A tokenizer in a thread of its own: it keeps settings between calls, so two must not use it at once.

    Args:
        tokenizer: of the model.
        max_tokens: of a request, over all its texts.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nogemm serve tokens")

    async def texts(
        self, texts: Sequence[str], pairs: Sequence[str] | None, longest: int, *, cut: bool, field: str
    ) -> list[Row]:
        """Return the tokens of texts, or of pairs of them.

        Args:
            longest: tokens of one.
            cut: longer ones are cut to it; else they are refused.
            field: of the request, for the message.
        Raises:
            ApiError: a text is longer, or all together are too long.
        """
        return await self._call(lambda: self._rows(texts, pairs, longest, cut, field))

    async def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is to be continued."""
        return (await self._call(lambda: self.tokenizer(text, verbose=False))).input_ids

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a chat in the model's own template.

        Raises:
            ApiError: the template refuses it.
        """
        listed = [{"role": one.role, "content": one.content} for one in messages]
        made = await self._call(lambda: self._chat(listed))
        return list(made["input_ids"])

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None, longest: int, cut: bool, field: str
    ) -> list[Row]:
        found = self.tokenizer(list(texts), None if pairs is None else list(pairs), verbose=False)
        rows = _rows_of(found)
        for index, row in enumerate(rows):
            if (length := len(row["input_ids"])) <= longest:
                continue
            if not cut:
                raise invalid(
                    f"{field}[{index}] has {length} tokens, and this model takes {longest}; shorten it, or send "
                    '"truncate": true to have its end cut off.',
                    field,
                )
            pair = {} if pairs is None else {"text_pair": [pairs[index]]}
            rows[index] = _rows_of(encode(self.tokenizer, [texts[index]], longest, None, **pair))[0]
        total = sum(len(row["input_ids"]) for row in rows)
        if total > self.max_tokens:
            raise ApiError(
                400,
                f"The request has {total} tokens, and {self.max_tokens} are allowed.",
                "too_many_tokens",
                param=field,
            )
        return rows

    def _chat(self, messages: list[dict[str, str]]) -> Any:
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            raise invalid("This model has no chat template; use /v1/completions.", "messages")
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise invalid(f"The model's chat template refuses these messages: {said}", "messages") from error


def _rows_of(found: Mapping[str, Any]) -> list[Row]:
    return [{name: found[name][i] for name in found} for i in range(len(found["input_ids"]))]
