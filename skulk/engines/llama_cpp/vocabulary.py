"""Text to tokens and back with a model's own vocabulary. Every method may be called from any thread."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from skulk.engines.grammar.constraint import Tokens
from skulk.engines.llama_cpp.native import library
from skulk.errors import RequestError

# llama_token_attr of llama.h: texts of these are recognised only with parse_special.
_ATTR_UNKNOWN: Final = 1 << 0
_ATTR_CONTROL: Final = 1 << 3
_TYPE_SPM: Final = 1
_INT32_MAX: Final = 2**31 - 1
_NO_TOKEN: Final = -1


class Vocabulary:
    """The vocabulary of a loaded model; it lives as long as the model does.

    Attributes:
        size: number of tokens.
        special_texts: texts that a tokenizer turns into control tokens when it parses specials.
        longest_piece_bytes: no token stands for more text than this.
        ends: tokens with which the model ends its answer (``llama_vocab_is_eog``).
        suppressed: tokens that the model's file says are never to be generated.
    """

    def __init__(self, model: int) -> None:
        self._lib: Any = library()
        self._vocab: int = self._lib.llama_model_get_vocab(model)
        self.size: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.bos: int | None = self._token(self._lib.llama_vocab_bos)
        self.eos: int | None = self._token(self._lib.llama_vocab_eos)
        self.adds_bos: bool = self.bos is not None and bool(self._lib.llama_vocab_get_add_bos(self._vocab))
        self.sep: int | None = self._token(self._lib.llama_vocab_sep)
        self.adds_eos: bool = bool(self._lib.llama_vocab_get_add_eos(self._vocab))
        self.adds_sep: bool = bool(self._lib.llama_vocab_get_add_sep(self._vocab))
        self._prefixes_space: bool = self._lib.llama_vocab_type(self._vocab) == _TYPE_SPM
        self._pieces: tuple[bytes, ...] = tuple(self._piece(token) for token in range(self.size))
        self.ends = frozenset(token for token in range(self.size) if self._lib.llama_vocab_is_eog(self._vocab, token))
        self.longest_piece_bytes: int = max((len(piece) for piece in self._pieces), default=1) or 1
        self.special_texts: frozenset[str] = frozenset(
            text for token in range(self.size) if self._is_special(token) and (text := self.text_of(token))
        )

        self.suppressed: tuple[int, ...] = self._suppressed()

    @property
    def infill(self) -> tuple[int, int, int] | None:
        """The tokens before a gap's prefix, its suffix and its filling; None: the model knows no infill."""
        marks = [self._token(get) for get in (self._lib.llama_vocab_fim_pre, self._lib.llama_vocab_fim_suf)]
        prefix, suffix = marks
        middle = self._token(self._lib.llama_vocab_fim_mid)
        return None if prefix is None or suffix is None or middle is None else (prefix, suffix, middle)

    def check_ids(self, tokens: Sequence[int], param: str) -> None:
        """Refuses ids that aren't the model's.

        Raises:
            RequestError: ``invalid_request``.
        """
        wrong = next((token for token in tokens if not 0 <= token < self.size), None)
        if wrong is not None:
            raise RequestError(
                "invalid_request",
                f"{param} holds token {wrong}; this model's tokens are 0 to {self.size - 1}.",
                param=param,
            )

    def _suppressed(self) -> tuple[int, ...]:
        count = ctypes.c_int32(0)
        tokens = self._lib.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return tuple(token for token in tokens[: count.value] if 0 <= token < self.size) if count.value > 0 else ()

    def _token(self, get: Any) -> int | None:
        token: int = get(self._vocab)
        return None if token == _NO_TOKEN else token

    def _is_special(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_get_attr(self._vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN))

    def text_of(self, token: int | None) -> str:
        """A token's own name in the vocabulary, ``<|im_end|>``; empty for None."""
        if token is None:
            return ""
        return (self._lib.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")

    def for_grammars(self) -> Tokens:
        """What grammars have to know; some 20 ms for 50,000 tokens."""
        return Tokens(
            pieces=self._pieces,
            ends=self.ends,
            token_of=self._token_named,
        )

    def _token_named(self, text: str) -> int | None:
        tokens = self.tokenise(text, parse_special=True, is_start=False)
        return tokens[0] if len(tokens) == 1 else None

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; empty for control tokens. They may cut a character."""
        return self._pieces[token]

    def whole_pieces(self) -> tuple[bytes, ...]:
        """The bytes of every token's text, of control tokens their names."""
        return tuple(piece or self._piece(token, special=True) for token, piece in enumerate(self._pieces))

    def _piece(self, token: int, *, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length: int = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, length)]

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return token in self.ends

    def tokenise(
        self, text: str, *, parse_special: bool, is_start: bool = True, add_special: bool = False
    ) -> tuple[int, ...]:
        """The ids of a text.

        Args:
            add_special: with the tokens that the model wants around a text (BOS, EOS, CLS, SEP); else without.
            text: any text; surrogates that aren't characters become ``?``.
            parse_special: whether texts of control tokens become control tokens.
            is_start: False: more text stands before this one, so no space is put in front of it as SentencePiece
                vocabularies do.
        """
        body = text.encode("utf-8", "replace")
        if add_special:
            return self._tokenise(body, parse_special=parse_special, add_special=True)
        if is_start or not self._prefixes_space:
            return self._tokenise(body, parse_special=parse_special)
        # A line feed is a token of its own in such vocabularies: it takes the space, and both go again.
        lead = self._tokenise(b"\n", parse_special=False)
        tokens = self._tokenise(b"\n" + body, parse_special=parse_special)
        if tokens[: len(lead)] == lead:
            return tokens[len(lead) :]
        return self._tokenise(body, parse_special=parse_special)

    def tokenise_bytes(self, body: bytes) -> tuple[int, ...]:
        """The ids of bytes that may be cut out of a text, without special tokens."""
        return self._tokenise(body, parse_special=False)

    def detokenise(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens by their names; bytes that are no characters are U+FFFD."""
        if not tokens:
            return ""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        room = self.longest_piece_bytes * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length: int = self._lib.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, False, True)
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", "replace")
            room = -length

    def _tokenise(self, body: bytes, *, parse_special: bool, add_special: bool = False) -> tuple[int, ...]:
        if not body and not add_special:
            return ()
        room = len(body) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count: int = self._lib.llama_tokenize(
                self._vocab, body, len(body), tokens, room, add_special, parse_special
            )
            if count >= 0:
                return tuple(tokens[:count])
            assert -count > room and count > -_INT32_MAX, "llama_tokenize asked for no more room than it had"
            room = -count
