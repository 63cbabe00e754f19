"""Short ways to messages that tests send about."""

from __future__ import annotations

from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import Chunk, Generate, StreamEnd, TextPrompt, Usage

REQUEST = "5e5c5a0e-0000-4000-8000-000000000001"
GATEWAY = "gateway-1"
RUNNER = "7d1f7d10-0000-4000-8000-000000000002-1"


def gateway_beat(number: int = 0, incarnation: str = "life1", gateway_id: str = GATEWAY) -> GatewayBeat:
    return GatewayBeat(
        gateway_id=gateway_id, incarnation=incarnation, node_id="node1", at=float(number), open_streams=number
    )


def generate(request_id: str = REQUEST, attempt: int = 1, incarnation: str = "life1", text: str = "Hello") -> Generate:
    return Generate(
        request_id=request_id,
        attempt=attempt,
        gateway_id=GATEWAY,
        gateway_incarnation=incarnation,
        model_id="a/model",
        prompt=TextPrompt(text=text),
    )


def stopped() -> StreamEnd:
    return StreamEnd(reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=5))


def chunk(
    seq: int, text: str = "x", end: StreamEnd | None = None, request_id: str = REQUEST, attempt: int = 1
) -> Chunk:
    return Chunk(request_id=request_id, attempt=attempt, seq=seq, runner_id=RUNNER, text=text, tokens=(seq,), end=end)


def texts(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
