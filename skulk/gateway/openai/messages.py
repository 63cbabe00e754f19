"""OpenAI messages into ours. Unknown keys inside messages are accepted: clients send answers back with extras."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from skulk.errors import RequestError
from skulk.wire.generation import ChatMessage, FunctionCall, MessageRole, ToolCall

_MEDIA: Final = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "file": "files",
    "video_url": "video",
}
_Name = Annotated[str, msgspec.Meta(max_length=512)]


class PartIn(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionIn(msgspec.Struct, frozen=True, kw_only=True):
    """A call's function; ``arguments``: JSON text."""

    name: _Name
    arguments: str = ""


class ToolCallIn(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made earlier; the extra ``index`` that some clients send is let pass."""

    id: _Name
    function: FunctionIn
    type: Literal["function"] = "function"


class MessageIn(msgspec.Struct, frozen=True, kw_only=True):
    """One message as clients send it."""

    role: MessageRole
    content: str | list[PartIn] | None = None
    name: _Name | None = None
    tool_call_id: _Name | None = None
    tool_calls: list[ToolCallIn] | None = None
    reasoning_content: str | None = None


def chat_messages(sent: list[MessageIn]) -> tuple[ChatMessage, ...]:
    """Messages in our form.

    Raises:
        RequestError: ``invalid_request``, ``unsupported_field``; ``param`` names the message and the part.
    """
    return tuple(_chat_message(message, f"messages[{index}]") for index, message in enumerate(sent))


def _chat_message(message: MessageIn, where: str) -> ChatMessage:
    if message.role == "tool" and message.tool_call_id is None:
        raise RequestError(
            "invalid_request", f"{where}: a tool message needs tool_call_id", param=f"{where}.tool_call_id"
        )
    calls = tuple(
        ToolCall(id=call.id, function=FunctionCall(name=call.function.name, arguments=call.function.arguments))
        for call in message.tool_calls or ()
    )
    if calls and message.role != "assistant":
        raise RequestError(
            "invalid_request", f"{where}: only assistant messages have tool_calls", param=f"{where}.tool_calls"
        )
    return ChatMessage(
        role=message.role,
        content=_content(message, f"{where}.content"),
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=calls,
        reasoning_content=message.reasoning_content,
    )


def _content(message: MessageIn, where: str) -> str:
    match message.content:
        case str(text):
            return text
        case None:
            # an assistant's turn may be nothing but calls or reasoning
            if message.role == "assistant":
                return ""
            raise RequestError("invalid_request", f"{where} is missing; send a text", param=where)
        case parts:
            return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(parts))


def _part_text(part: PartIn, where: str) -> str:
    if part.type in _MEDIA:
        raise RequestError(
            "unsupported_field",
            f"{where}: this version lacks {_MEDIA[part.type]} as input; send text parts only",
            param=where,
        )
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal") or text is None:
        raise RequestError("invalid_request", f'{where} is not {{"type": "text", "text": …}}', param=where)
    return text
