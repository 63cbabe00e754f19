"""A prompt's token ids: the model's own template, its tokenizer, and people's text kept out of special tokens.

    ChatPrompt  ──shield──> template ──> segments ──tokenise──> ids   (template text: specials parsed; people's: not)
    TextPrompt  ──tokenise, no specials──> ids
    TokenPrompt ──checked──> ids
    InfillPrompt ──> prefix mark, prefix, suffix mark, suffix, middle mark

BOS is put in front where the vocabulary wants it and the template didn't.
"""

from __future__ import annotations

import json
import logging
import secrets
from typing import Any, Final, assert_never

import msgspec

from skulk.batching.reuse import common_beginning
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.engines.shield import NONCE_DIGITS, Segment, Shield, SpecialTexts
from skulk.engines.template import TemplateRenderer
from skulk.errors import RequestError
from skulk.wire.generation import ChatMessage, ChatPrompt, InfillPrompt, Prompt, TextPrompt, TokenPrompt, ToolCall

log = logging.getLogger(__name__)

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endfor %}Assistant:"
)
"""For models that carry no template: roles as words. Good enough to try a base model, no more."""


class Prompter:
    """Makes ids of prompts for one model. `tokens_of` may be called from any thread.

    Args:
        vocabulary: the model's.
        template: its chat template; None: `PLAIN_TEMPLATE`, with a warning.
        window: tokens of one request.
        renderer: renders the template; owned from here on.
    """

    def __init__(self, vocabulary: Vocabulary, template: str | None, window: int) -> None:
        if template is None:
            log.warning("the model carries no chat template; a plain one is used, and answers may ramble")
        self._vocabulary = vocabulary
        self._window = window
        self._template = template if template is not None else PLAIN_TEMPLATE
        self._specials = SpecialTexts(vocabulary.special_texts)
        self._renderer = TemplateRenderer(self._template)

    def start(self) -> None:
        """Brings the template's process up before the first request."""
        self._renderer.start()

    def close(self) -> None:
        """Ends the template's process."""
        self._renderer.close()

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt.

        Raises:
            RequestError: ``template_failed``, ``invalid_request`` (no tokens at all, or ids that aren't the model's),
                ``context_length_exceeded`` (so much text that it can't fit, whatever its tokens are).
        """
        match prompt:
            case ChatPrompt():
                tokens = self._chat(prompt)
            case TextPrompt(text=text):
                self._check_size(len(text))
                tokens = self._with_bos(self._vocabulary.tokenise(text, parse_special=False))
            case TokenPrompt(tokens=tokens):
                self._vocabulary.check_ids(tokens, "the prompt")
            case InfillPrompt():
                self._check_size(len(prompt.prefix) + len(prompt.suffix))
                tokens = self._with_bos(self._infill(prompt))
            case _:
                assert_never(prompt)
        if not tokens:
            raise RequestError(
                "invalid_request", "the prompt is empty; send at least one token of text.", param="prompt"
            )
        return tokens

    def border_of(self, prompt: Prompt, tokens: tuple[int, ...]) -> int:
        """How many of ``tokens`` come before the prompt's last turn: what the turns before it begin with too."""
        if not isinstance(prompt, ChatPrompt) or len(prompt.messages) < 2:
            return 0
        before = msgspec.structs.replace(prompt, messages=prompt.messages[:-1])
        try:
            earlier = self._chat(before, is_asked=False)
        except RequestError:
            return 0  # a template that can't end there
        return common_beginning(tokens, earlier)

    def _chat(self, prompt: ChatPrompt, *, is_asked: bool = True) -> tuple[int, ...]:
        if not prompt.messages:
            raise RequestError("invalid_request", "messages is empty; send at least one message.", param="messages")
        self._check_size(sum(_size_of(message) for message in prompt.messages))
        nonce = f"{secrets.randbelow(10**NONCE_DIGITS):0{NONCE_DIGITS}d}"
        shield = Shield(self._specials, nonce)
        variables = self._variables(prompt, shield) | {"add_generation_prompt": is_asked}
        try:
            rendered = self._renderer.render(variables, nonce)
        except RequestError as error:
            raise RequestError(error.code, shield.reveal(error.detail), param=error.param) from error
        return self._with_bos(self._tokenise(shield.segments(rendered)))

    def _variables(self, prompt: ChatPrompt, shield: Shield) -> dict[str, Any]:
        return {
            "tools": None,
            "documents": None,
            **shield.hide_all(prompt.variables),
            "messages": [self._message(message, shield) for message in prompt.messages],
            "bos_token": self._vocabulary.text_of(self._vocabulary.bos),
            "eos_token": self._vocabulary.text_of(self._vocabulary.eos),
        }

    def _message(self, message: ChatMessage, shield: Shield) -> dict[str, Any]:
        """A message as templates know it. A role is one of five words of ours, so it is never hidden."""
        fields: dict[str, Any] = {"role": self._role(message), "content": shield.hide(message.content)}
        if message.name is not None:
            fields["name"] = shield.hide(message.name, is_name=True)
        if message.tool_call_id is not None:
            fields["tool_call_id"] = shield.hide(message.tool_call_id, is_name=True)
        if message.reasoning_content is not None:
            fields["reasoning_content"] = shield.hide(message.reasoning_content)
        if message.tool_calls:
            fields["tool_calls"] = [_tool_call(call, shield) for call in message.tool_calls]
        return fields

    def _role(self, message: ChatMessage) -> str:
        """``developer`` is the newer word for ``system``; only few templates know it."""
        if message.role == "developer" and "developer" not in self._template:
            return "system"
        return message.role

    def _tokenise(self, segments: tuple[Segment, ...]) -> tuple[int, ...]:
        tokens: list[int] = []
        for index, segment in enumerate(segments):
            tokens += self._vocabulary.tokenise(segment.text, parse_special=segment.is_trusted, is_start=index == 0)
        return tuple(tokens)

    def _infill(self, prompt: InfillPrompt) -> tuple[int, ...]:
        """Prefix, suffix, then the filling: the order that models with these tokens were trained on first."""
        marks = self._vocabulary.infill
        if marks is None:
            raise RequestError(
                "unsupported_field",
                "suffix: this model has no tokens for infill (FIM); leave the field out, or ask a code model",
                param="suffix",
            )
        before, after, filling = marks
        prefix = self._vocabulary.tokenise(prompt.prefix, parse_special=False)
        suffix = self._vocabulary.tokenise(prompt.suffix, parse_special=False)
        return (before, *prefix, after, *suffix, filling)

    def _with_bos(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        bos = self._vocabulary.bos
        if bos is None or not self._vocabulary.adds_bos or tokens[:1] == (bos,):
            return tokens
        return (bos, *tokens)

    def _check_size(self, characters: int) -> None:
        """Refuses early what can't fit: no token stands for more bytes than the longest one."""
        at_least = characters // self._vocabulary.longest_piece_bytes
        if at_least > self._window:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {characters} characters, which is at least {at_least} tokens; this instance's context "
                f"length is {self._window}. Send less, or place the model with a longer context.",
                param="messages",
            )


def _size_of(message: ChatMessage) -> int:
    calls = sum(len(call.function.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning_content or "") + calls


def _tool_call(call: ToolCall, shield: Shield) -> dict[str, Any]:
    """An earlier call. Templates expect its arguments as an object; text that is none stays text."""
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    if not isinstance(arguments, dict):
        arguments = call.function.arguments
    return {
        "id": shield.hide(call.id, is_name=True),
        "type": call.type,
        "function": {"name": shield.hide(call.function.name, is_name=True), "arguments": shield.hide_all(arguments)},
    }
