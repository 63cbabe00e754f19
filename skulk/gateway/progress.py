"""What of an answer has come so far: enough for another runner to go on with it, four bytes a token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from skulk.wire.generation import Chunk, Resume, ResumedChoice, Usage


class Progress:
    """The ids and the length of the text of each choice. What a handler took counts as sent: it writes it in order.

    ``n``: choices.
    """

    def __init__(self, n: int) -> None:
        # int32, as the engine's own ids
        self._tokens = [array("i") for _ in range(n)]
        self._characters = [0] * n

    @property
    def is_empty(self) -> bool:
        """Whether nothing was drawn yet."""
        return not any(self._tokens) and not any(self._characters)

    def note(self, chunks: Iterable[Chunk]) -> None:
        """Takes in what came."""
        for chunk in chunks:
            self._tokens[chunk.choice].extend(chunk.tokens)
            self._characters[chunk.choice] += len(chunk.text)

    def resume(self, prompt_ids: tuple[int, ...]) -> Resume:
        """Where another runner is to go on."""
        first, *others = (
            ResumedChoice(emitted_tokens=tuple(tokens), sent_characters=characters)
            for tokens, characters in zip(self._tokens, self._characters, strict=True)
        )
        return Resume(
            prompt_tokens=prompt_ids,
            emitted_tokens=first.emitted_tokens,
            sent_characters=first.sent_characters,
            others=tuple(others),
        )

    def usage(self, prompt_tokens: int) -> Usage:
        """What was drawn so far."""
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=sum(map(len, self._tokens)))
