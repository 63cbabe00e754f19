"""OpenAI requests as records, and their translation into the one internal generation.

The ranges stand in the types; msgspec names field and range when one is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from skulk.batching.ranges import MAX_BREAKER_BYTES, MAX_BREAKERS, MAX_GRAMMAR_CHARACTERS
from skulk.errors import RequestError
from skulk.gateway.bodies import read_as
from skulk.gateway.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, sort_fields
from skulk.gateway.openai.messages import MessageIn, chat_messages
from skulk.gateway.run import Generation
from skulk.wire.generation import ChatPrompt, InfillPrompt, Limits, Prompt, Sampling, TextPrompt, TokenPrompt
from skulk.wire.model import ModelCard

MAX_CHOICES: Final = 8
MAX_PROMPTS: Final = 128
MAX_STOPS: Final = 16
MAX_MODEL_ID: Final = 512
INT32: Final = 2**31 - 1
_TOKEN_ID: Final = re.compile(r"[0-9]{1,9}", re.ASCII)

ModelId: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_MODEL_ID)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=INT32)]
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Penalty: TypeAlias = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Bias: TypeAlias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]
StopText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Breaker: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_BREAKER_BYTES)]
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT32)]
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``include_obfuscation`` pads events; ours are never padded. Tool call deltas come with tool calling."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    include_tool_call_deltas: bool | None = None


class CommonRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and text completions share: the honoured fields of the table."""

    model: ModelId
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: StopText | Annotated[list[StopText], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=INT32)] | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    top_n_sigma: Annotated[float, msgspec.Meta(ge=-1.0, le=100.0)] | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    mirostat_eta: Share | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=INT32)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    dry_multiplier: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    dry_base: Annotated[float, msgspec.Meta(ge=1.0, le=100.0)] | None = None
    dry_allowed_length: Annotated[int, msgspec.Meta(ge=0, le=INT32)] | None = None
    dry_penalty_last_n: Annotated[int, msgspec.Meta(ge=-1, le=INT32)] | None = None
    dry_sequence_breakers: Annotated[list[Breaker], msgspec.Meta(min_length=1, max_length=MAX_BREAKERS)] | None = None
    logit_bias: Annotated[dict[str, Bias], msgspec.Meta(max_length=1024)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    grammar: Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_CHARACTERS)] | None = None


class ChatRequest(CommonRequest, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[MessageIn], msgspec.Meta(min_length=1, max_length=100_000)]
    max_completion_tokens: Count | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class CompletionRequest(CommonRequest, frozen=True, kw_only=True):
    """``POST /v1/completions``.

    Attributes:
        prompt: a text, token ids, or an array of such; each has ``n`` choices of its own.
        suffix: what comes after the gap that the answer fills.
        echo: each choice begins with the text of the prompt.
    """

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool = False


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request, understood.

    Attributes:
        generations: one for each prompt, alike in all else.
        inert: names of the fields that were sent and do nothing.
        include_usage: the stream shall end with the usage.
        echo: the prompts that their choices shall begin with; empty: they shall not.
    """

    generations: tuple[Generation, ...]
    stream: bool
    include_usage: bool
    inert: tuple[str, ...]
    echo: tuple[TextPrompt | TokenPrompt, ...] = ()


def read_chat(body: dict[str, Any], card: ModelCard) -> Asked:
    """A chat request.

    Args:
        body: the decoded JSON object.
        card: of the model; one that can't think makes ``enable_thinking`` and ``reasoning_effort`` inert.

    Raises:
        RequestError: ``invalid_request``, ``unsupported_field``; ``param`` names the field.
    """
    fields = sort_fields(body, CHAT_FIELDS)
    request = read_as(fields.honoured, ChatRequest)
    thinking = {
        name: fields.honoured[name] for name in ("enable_thinking", "reasoning_effort") if name in fields.honoured
    }
    can_think = "thinking" in card.capabilities
    prompt = ChatPrompt(messages=chat_messages(request.messages), variables=thinking if can_think else {})
    inert = fields.inert if can_think else (*fields.inert, *thinking)
    return _asked(request, card, [prompt], _max_tokens(request), inert)


def read_completion(body: dict[str, Any], card: ModelCard) -> Asked:
    """A text completion request.

    Raises:
        RequestError: ``invalid_request``, ``unsupported_field``; ``param`` names the field.
    """
    fields = sort_fields(body, COMPLETION_FIELDS)
    request = read_as(fields.honoured, CompletionRequest)
    # OpenAI's own default of this call, and only of this one
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    written = _text_prompts(request.prompt)
    prompts = [_infill(one, request.suffix) if request.suffix else one for one in written]
    asked = _asked(request, card, prompts, max_tokens, fields.inert)
    return msgspec.structs.replace(asked, echo=written) if request.echo else asked


def model_of(body: dict[str, Any]) -> str:
    """The model a body names, before the rest is read.

    Raises:
        RequestError: ``invalid_request``.
    """
    match body.get("model"):
        case str(model) if 0 < len(model) <= MAX_MODEL_ID:
            return model
        case None:
            raise RequestError("invalid_request", "model is missing; GET /v1/models lists them", param="model")
        case _:
            raise RequestError(
                "invalid_request", f"model must be a string of 1 to {MAX_MODEL_ID} characters", param="model"
            )


def _asked(
    request: CommonRequest, card: ModelCard, prompts: Sequence[Prompt], max_tokens: int | None, inert: tuple[str, ...]
) -> Asked:
    if card.embeds:
        raise RequestError(
            "invalid_request", f"{card.model_id} generates no text; POST /v1/embeddings (or /v1/rerank)", param="model"
        )
    options = request.stream_options
    if options is not None and not request.stream:
        raise RequestError("invalid_request", "stream_options needs stream: true", param="stream_options")
    generation = Generation(
        model_id=card.model_id,
        prompt=prompts[0],
        sampling=_sampling(request),
        limits=Limits(max_tokens=max_tokens, stop=_stops(request.stop), ignore_eos=request.ignore_eos),
        n=request.n,
    )
    include_usage = options is not None and bool(options.include_usage)
    generations = tuple(msgspec.structs.replace(generation, prompt=prompt) for prompt in prompts)
    return Asked(generations=generations, stream=request.stream, include_usage=include_usage, inert=inert)


def _sampling(request: CommonRequest) -> Sampling:
    return Sampling(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        typical_p=request.typical_p,
        top_n_sigma=request.top_n_sigma,
        xtc_probability=request.xtc_probability,
        xtc_threshold=request.xtc_threshold,
        mirostat=request.mirostat,
        mirostat_tau=request.mirostat_tau,
        mirostat_eta=request.mirostat_eta,
        repeat_penalty=request.repeat_penalty,
        repeat_last_n=request.repeat_last_n,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        dry_multiplier=request.dry_multiplier,
        dry_base=request.dry_base,
        dry_allowed_length=request.dry_allowed_length,
        dry_penalty_last_n=request.dry_penalty_last_n,
        dry_sequence_breakers=None if request.dry_sequence_breakers is None else tuple(request.dry_sequence_breakers),
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=request.seed,
        # An empty one asks for nothing, as in llama.cpp.
        grammar=request.grammar or None,
    )


def _logit_bias(sent: dict[str, float]) -> dict[int, float]:
    for token in sent:
        if not _TOKEN_ID.fullmatch(token):
            raise RequestError("invalid_request", f"logit_bias: {token[:50]!r} is no token id", param="logit_bias")
    return {int(token): bias for token, bias in sent.items()}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            "invalid_request",
            f"max_tokens {old} and max_completion_tokens {new} differ; send one of them",
            param="max_tokens",
        )
    return old if new is None else new


def _text_prompts(prompt: str | list[Any]) -> tuple[TextPrompt | TokenPrompt, ...]:
    match prompt:
        case str() | [int(), *_]:
            return (_text_prompt(prompt),)
        case []:
            raise RequestError("invalid_request", "prompt is empty", param="prompt")
        case _ if len(prompt) > MAX_PROMPTS:
            raise RequestError(
                "invalid_request",
                f"prompt: {len(prompt)} prompts are over the {MAX_PROMPTS} of one request; send several requests",
                param="prompt",
            )
        case _:
            return tuple(_text_prompt(one, f"prompt[{index}]") for index, one in enumerate(prompt))


def _text_prompt(prompt: Any, name: str = "prompt") -> TextPrompt | TokenPrompt:
    match prompt:
        case str():
            return TextPrompt(text=prompt)
        case [int(), *_]:
            return TokenPrompt(tokens=_token_ids(prompt))
        case []:
            raise RequestError("invalid_request", f"{name} is empty", param="prompt")
        case _:
            raise RequestError("invalid_request", f"{name} must be a text or an array of token ids", param="prompt")


def _infill(prompt: TextPrompt | TokenPrompt, suffix: str) -> InfillPrompt:
    if not isinstance(prompt, TextPrompt):
        raise RequestError("invalid_request", "suffix needs a prompt of text, not of token ids", param="suffix")
    return InfillPrompt(prefix=prompt.text, suffix=suffix)


def _token_ids(tokens: Sequence[Any]) -> tuple[int, ...]:
    try:
        return msgspec.convert(tokens, tuple[TokenId, ...])
    except msgspec.ValidationError as error:
        raise RequestError("invalid_request", f"prompt: {error}", param="prompt") from error
