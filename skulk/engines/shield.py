"""Keeps people's text out of the special tokens: pure text work around a template.

    people's strings ──hide──> strings, the dangerous ones replaced by digits ──template──> text
    text ──segments──> (the template's text, parsed for specials) and (people's text, never parsed)

A string is dangerous when a special token's text stands in it, or when it ends like the start (or starts like the
end) of one, so that what the template puts beside it could complete it. Only dangerous strings are replaced; all
others reach the template as they are, and what it does with them stays possible. A stand-in is digits only: JSON,
HTML and case filters leave it alone. Outer white space stays outside, for `trim`.

What this can't see: a template that itself cuts people's text apart and joins the parts differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import msgspec

from skulk.errors import RequestError

Json: TypeAlias = Any

NONCE_DIGITS: Final = 40
_INDEX_DIGITS: Final = 6
MAX_STRINGS: Final = 10**_INDEX_DIGITS
MAX_NESTING: Final = 64


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of rendered text. ``is_trusted``: the template's, so its special tokens count."""

    text: str
    is_trusted: bool


class SpecialTexts:
    """The texts of a vocabulary's special tokens, ready to be looked for. Letters of either case count."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(text.lower() for text in texts if text.strip())
        first_letters = "".join(sorted({re.escape(text[0]) for text in self._texts}))
        self._first = re.compile(f"[{first_letters}]") if first_letters else None
        self._starts = frozenset(text[:length] for text in self._texts for length in range(1, len(text)))
        self._ends = frozenset(text[length:] for text in self._texts for length in range(1, len(text)))
        self._longest = max((len(text) for text in self._texts), default=0)

    def is_dangerous(self, text: str, *, is_name: bool = False) -> bool:
        """Whether a special token could come to stand in, or at the edge of, this text.

        Args:
            text: what somebody wrote.
            is_name: also when the text lies inside a special token's, as ``im_end`` does: templates put names
                between brackets.
        """
        if self._first is None:
            return False
        lowered = text.lower()
        if any(self._stands_at(lowered, match.start()) for match in self._first.finditer(lowered)):
            return True
        variants = {lowered, lowered.strip()}
        if any(self._touches(variant) for variant in variants):
            return True
        return is_name and any(
            len(variant) > 1 and variant in special for variant in variants for special in self._texts
        )

    def _stands_at(self, text: str, start: int) -> bool:
        """Whether a special token's text begins here. Follows only starts of tokens: a vocabulary has thousands."""
        for end in range(start + 1, min(len(text), start + self._longest) + 1):
            part = text[start:end]
            if part in self._texts:
                return True
            if part not in self._starts:
                return False
        return False

    def _touches(self, text: str) -> bool:
        reach = range(1, min(len(text), self._longest) + 1)
        return any(text[-length:] in self._starts or text[:length] in self._ends for length in reach)


class Shield:
    """The strings of one request that were replaced. ``nonce``: 40 random decimal digits, new for each request."""

    def __init__(self, specials: SpecialTexts, nonce: str) -> None:
        assert len(nonce) == NONCE_DIGITS and nonce.isdecimal(), "a nonce is 40 digits"
        self._specials = specials
        self._nonce = nonce
        self._hidden: list[str] = []
        self._stand_in = re.compile(rf"{nonce}(\d{{{_INDEX_DIGITS}}})(\d)")

    def hide(self, text: str, *, is_name: bool = False) -> str:
        """The text, or what stands in for it."""
        if not self._specials.is_dangerous(text, is_name=is_name):
            return text
        core = text.strip()
        if not core:
            return text
        if len(self._hidden) >= MAX_STRINGS:
            raise RequestError("invalid_request", "more than a million texts hold special tokens' texts; send fewer.")
        start = text.index(core)
        self._hidden.append(core)
        index = len(self._hidden) - 1
        return f"{text[:start]}{self._nonce}{index:0{_INDEX_DIGITS}d}0{text[start + len(core) :]}"

    def hide_all(self, value: Json, depth: int = 0) -> Json:
        """A JSON value with all its strings hidden, keys included.

        Raises:
            RequestError: ``invalid_request``: nested more than 64 deep.
        """
        if depth > MAX_NESTING:
            raise RequestError("invalid_request", f"values are nested more than {MAX_NESTING} deep; flatten them.")
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            items = cast("Mapping[str, Json]", value).items()
            return {self.hide(key): self.hide_all(item, depth + 1) for key, item in items}
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            return [self.hide_all(item, depth + 1) for item in cast("Sequence[Json]", value)]
        return value

    def segments(self, rendered: str) -> tuple[Segment, ...]:
        """The rendered text in its parts, in order; none is empty and no two neighbours are both trusted.

        Raises:
            RequestError: ``template_failed``: the template took a stand-in apart.
        """
        parts: list[Segment] = []
        end = 0
        for match in self._stand_in.finditer(rendered):
            self._add_trusted(parts, rendered[end : match.start()])
            parts.append(Segment(text=self._shown(match), is_trusted=False))
            end = match.end()
        self._add_trusted(parts, rendered[end:])
        return tuple(parts)

    def reveal(self, text: str) -> str:
        """A text for people, with the hidden strings back in it."""
        return self._stand_in.sub(self._shown, text)

    def _shown(self, match: re.Match[str]) -> str:
        """The string behind a stand-in, escaped as often as the template wrote it as JSON."""
        index, depth = int(match.group(1)), int(match.group(2))
        text = self._hidden[index] if index < len(self._hidden) else ""
        for _ in range(depth):
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return text

    def _add_trusted(self, parts: list[Segment], text: str) -> None:
        if not text:
            return
        if self._hidden and self._nonce[: NONCE_DIGITS // 2] in text:
            raise RequestError(
                "template_failed",
                "the model's template cuts texts apart, and one of them holds the text of a special token; "
                "send the messages without such texts.",
            )
        parts.append(Segment(text=text, is_trusted=True))
