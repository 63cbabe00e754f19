"""The internal generation request and its chunks. Dialects are translations to and from these (DESIGN 7)."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from skulk.wire.base import ErrorBody, Wire

MessageRole = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]
StreamPhase = Literal["queued", "prefill", "decode", "ended"]
Priority = Literal["interactive", "batch"]


class FunctionCall(Wire, frozen=True, kw_only=True):
    """A call that the model made earlier; ``arguments``: JSON text."""

    name: str
    arguments: str


class ToolCall(Wire, frozen=True, kw_only=True):
    """A tool call in the history."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(Wire, frozen=True, kw_only=True):
    """One message of a conversation, text only so far."""

    role: MessageRole
    content: str = ""
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_content: str | None = None


class ChatPrompt(Wire, frozen=True, kw_only=True, tag="chat"):
    """Messages, rendered with the model's own template in the runner.

    Attributes:
        variables: extra template variables (``enable_thinking``), JSON values.
    """

    messages: tuple[ChatMessage, ...]
    variables: dict[str, Any] = {}


class TextPrompt(Wire, frozen=True, kw_only=True, tag="text"):
    """Text as it stands; special tokens in it stay text."""

    text: str


class TokenPrompt(Wire, frozen=True, kw_only=True, tag="tokens"):
    """Token ids as they stand."""

    tokens: tuple[int, ...]


class InfillPrompt(Wire, frozen=True, kw_only=True, tag="infill"):
    """Text before and after a gap that the model is to fill; only for models with tokens for it."""

    prefix: str
    suffix: str


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


class Sampling(Wire, frozen=True, kw_only=True):
    """How tokens are drawn; None: the model's own default, else OpenAI's. Names and meanings are llama-server's.

    Attributes:
        temperature: 0 is greedy.
        top_n_sigma: keeps what is within so many standard deviations of the best; 0 or less: off.
        xtc_probability: of leaving out, at a token, all but the last of those above ``xtc_threshold``.
        mirostat: 1 or 2: that algorithm in place of filters and penalties; ``mirostat_tau``: bits of surprise aimed at.
        repeat_last_n: how far the penalties look back; -1: the whole window.
        dry_multiplier: 0: DRY is off.
        dry_penalty_last_n: how far DRY looks back; -1: the whole window.
        dry_sequence_breakers: texts that end a repetition; None: line feed, colon, quotation mark, asterisk.
        seed: with choice and position it decides every draw.
        grammar: GBNF that the answer is held to; None: any text.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    grammar: str | None = None


class Limits(Wire, frozen=True, kw_only=True):
    """When to stop. ``max_tokens`` None: as many as the window holds.

    Attributes:
        stop: texts that end the answer and are not part of it.
        ignore_eos: go on over the model's end tokens.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class ResumedChoice(Wire, frozen=True, kw_only=True):
    """What another runner had drawn of one choice, and how many characters of its text were sent."""

    emitted_tokens: tuple[int, ...] = ()
    sent_characters: int = 0


class Resume(Wire, frozen=True, kw_only=True):
    """Where another runner left off: the ids of prompt and answer, and how much text was already sent (ADR 10).

    Attributes:
        emitted_tokens: of choice 0, as ``sent_characters`` is; ``others`` are the choices from 1 on, all of them.
    """

    prompt_tokens: tuple[int, ...]
    emitted_tokens: tuple[int, ...]
    sent_characters: int
    others: tuple[ResumedChoice, ...] = ()

    @property
    def choices(self) -> tuple[ResumedChoice, ...]:
        """Every choice, in order."""
        first = ResumedChoice(emitted_tokens=self.emitted_tokens, sent_characters=self.sent_characters)
        return (first, *self.others)


class Generate(Wire, frozen=True, kw_only=True):
    """One generation, asked of one runner. Its deadline travels beside it as a duration.

    Attributes:
        request_id: the same over all attempts; `attempt` counts from 1.
        gateway_id: whose stream subject the chunks go to; ``gateway_incarnation`` is its life.
        n: choices of the same prompt.
        priority: ``batch`` waits for a slot behind every ``interactive`` one; a resumed answer goes before both.
        timeout_s: seconds from its arrival at the runner until the stream ends with ``deadline_exceeded``, whatever it
            has sent by then; None: the runner's own limit. A duration, for the clocks of two machines differ.
        part_of: the request of several prompts that this is one of; a `Cancel` of that id ends it too.
    """

    request_id: str
    attempt: int = 1
    gateway_id: str
    gateway_incarnation: str
    model_id: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    limits: Limits = Limits()
    n: int = 1
    resume: Resume | None = None
    timeout_s: float | None = None
    priority: Priority = "interactive"
    part_of: str = ""


class Accepted(Wire, frozen=True, kw_only=True):
    """A runner took the request; chunks follow. Refusals are errors of the call.

    Attributes:
        queued: requests that wait for a slot before it.
        in_flight: requests that were being computed when it came.
        prompt_ids: the ids of the prompt; another runner goes on from them. Empty: this runner can't tell them.
    """

    request_id: str
    runner_id: str
    prompt_tokens: int
    queued: int = 0
    in_flight: int = 0
    prompt_ids: tuple[int, ...] = ()


class Cancel(Wire, frozen=True, kw_only=True):
    """Stop a request, or all that are part of it; unknown ones are no error, for a cancel may cross the end."""

    request_id: str


class Cancelled(Wire, frozen=True, kw_only=True):
    """Answer to `Cancel`; ``was_running``: it had not ended before."""

    request_id: str
    was_running: bool


class Retire(Wire, frozen=True, kw_only=True):
    """Take nothing for ``hold_s`` seconds if nothing is in flight: whoever asks is about to stop this runner."""

    hold_s: float


class Retired(Wire, frozen=True, kw_only=True):
    """Answer to `Retire`; ``is_idle``: nothing is in flight, and nothing is taken for that long."""

    runner_id: str
    is_idle: bool


class Resend(Wire, frozen=True, kw_only=True):
    """Send the chunks of one attempt again from sequence number ``start``."""

    request_id: str
    attempt: int
    start: int


class Resent(Wire, frozen=True, kw_only=True):
    """Answer to `Resend`: the chunks themselves, at most ``limit`` bytes of them; ask on from the last."""

    request_id: str
    attempt: int
    chunks: tuple[Chunk, ...]


class Usage(Wire, frozen=True, kw_only=True):
    """Tokens; ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timings(Wire, frozen=True, kw_only=True):
    """Where the time of a request went, in seconds at the runner.

    Attributes:
        prefill_tps: prompt tokens computed a second of prefill; those taken over don't count. 0: no time was measured.
        decode_tps: tokens drawn a second of decode, over all choices.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    prefill_tps: float = 0.0
    decode_tps: float = 0.0


class StreamEnd(Wire, frozen=True, kw_only=True):
    """The one end of a stream.

    Attributes:
        reason: ``error`` comes with ``error``.
    """

    reason: FinishReason
    error: ErrorBody | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class Chunk(Wire, frozen=True, kw_only=True):
    """One message of a stream.

    Attributes:
        seq: 0, 1, 2, … within one attempt, no gap.
        choice: which of the ``n`` choices.
        text: new text of the choice; empty where bytes or a possible stop string are held back.
        tokens: the ids behind it.
        finish_reason: this choice ended with this chunk.
        end: the stream ended with this chunk; exactly one chunk of an attempt has it.
    """

    request_id: str
    attempt: int
    seq: int
    runner_id: str
    choice: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    end: StreamEnd | None = None


class StreamState(Wire, frozen=True, kw_only=True):
    """One stream in an `Alive` message. ``step_age_s``: since the engine's last finished step."""

    attempt: int
    last_seq: int
    phase: StreamPhase
    processed: int = 0
    total: int = 0
    step_age_s: float = 0.0


class Alive(Wire, frozen=True, kw_only=True):
    """Every 0.5 s from each runner to each gateway it serves: its streams there, by request id."""

    runner_id: str
    gateway_id: str
    at: float
    streams: dict[str, StreamState]
