"""Served endpoints are NATS services: what ``nats micro ls``, ``info`` and ``stats`` ask is answered by the schemas."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from skulk.bus.core import CoreBus
from skulk.bus.port import Call
from skulk.bus.subjects import EVENTS_HISTORY, RUNNER_CANCEL, RUNNER_RESEND
from skulk.bus.transport import Raw
from skulk.errors import RequestError, SkulkError
from skulk.wire.commands import History, HistoryRequest
from skulk.wire.generation import Cancel, Cancelled, Resend, Resent
from tests.support.bus import BusWorld, Collector

SCHEMAS = Path(__file__).parents[2] / "subjects" / "schemas" / "nats-micro"


async def cancel(call: Call[Cancel]) -> Cancelled:
    if call.message.request_id == "refuse":
        raise RequestError("command_not_found", "no such request")
    return Cancelled(request_id=call.message.request_id, was_running=True)


async def resend(call: Call[Resend]) -> Resent:
    return Resent(request_id=call.message.request_id, attempt=1, chunks=())


async def discover(bus: CoreBus, subject: str, count: int) -> list[dict[str, Any]]:
    """What comes back from a question to everybody, checked against its schema, by service id."""
    heard: Collector[Raw] = Collector()
    inbox = f"discovery.{bus.cluster}.{len(subject)}"
    subscription = await bus.listen(inbox, heard)
    await bus.settle()
    await bus.send(Raw(subject, b"", inbox))
    answers = [json.loads(raw.body) for raw in await heard.wait(count)]
    await bus.flush()
    await subscription.close()
    ours = [answer for answer in answers if answer["metadata"]["cluster"] == bus.cluster]
    verb = subject.split(".")[1].lower()
    schema = json.loads((SCHEMAS / f"{verb}_response.json").read_text())
    for answer in ours:
        jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
    return sorted(ours, key=lambda answer: answer["id"])


async def test_ping_info_and_stats_of_all_of_a_name_and_of_one(world: BusWorld) -> None:
    asker, one, two = await world.bus("asker"), await world.bus("one"), await world.bus("two")
    runner = await one.serve(
        "runner", {RUNNER_CANCEL: cancel, RUNNER_RESEND: resend}, metadata={"node": "n1"}, runner="r-1"
    )
    other = await two.serve("runner", {RUNNER_CANCEL: cancel}, runner="r-2")

    async def history(call: Call[HistoryRequest]) -> History:
        return History(node_id="n", events=())

    events = await two.serve("events", {EVENTS_HISTORY: history})
    for verb in ("PING", "INFO", "STATS"):
        found = await discover(asker, f"$SRV.{verb}", 3)
        assert [answer["id"] for answer in found] == sorted([runner.service_id, other.service_id, events.service_id])
        found = await discover(asker, f"$SRV.{verb}.runner", 2)
        assert [answer["id"] for answer in found] == sorted([runner.service_id, other.service_id])
        (only,) = await discover(asker, f"$SRV.{verb}.runner.{runner.service_id}", 1)
        assert (only["id"], only["name"], only["type"]) == (
            runner.service_id,
            "runner",
            f"io.nats.micro.v1.{verb.lower()}_response",
        )
        assert only["metadata"] == {"cluster": world.cluster, "client": "one", "node": "n1", "runner": "r-1"}


async def test_info_names_subjects_and_queue_groups(world: BusWorld) -> None:
    bus = await world.bus("one")
    service = await bus.serve("runner", {RUNNER_CANCEL: cancel, RUNNER_RESEND: resend}, runner="r-1")
    (info,) = await discover(bus, f"$SRV.INFO.runner.{service.service_id}", 1)
    base = f"skulk.{world.cluster}.v1.runner"
    assert info["endpoints"] == [
        {"name": "cancel", "subject": f"{base}.cancel.r-1", "queue_group": "", "metadata": {}},
        {"name": "resend", "subject": f"{base}.resend.r-1", "queue_group": "", "metadata": {}},
    ]


async def test_stats_count_calls_errors_and_time(world: BusWorld) -> None:
    bus = await world.bus("one")
    service = await bus.serve("runner", {RUNNER_CANCEL: cancel, RUNNER_RESEND: resend}, runner="r-1")
    for request_id in ("a", "b"):
        await bus.request(RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=5.0, runner="r-1")
    with pytest.raises(RequestError):
        await bus.request(RUNNER_CANCEL, Cancel(request_id="refuse"), timeout_s=5.0, runner="r-1")
    (stats,) = await discover(bus, f"$SRV.STATS.runner.{service.service_id}", 1)
    cancels, resends = stats["endpoints"]
    assert (cancels["num_requests"], cancels["num_errors"]) == (3, 1)
    assert cancels["last_error"] == "40404:no such request"
    assert cancels["processing_time"] > 0
    assert cancels["average_processing_time"] == cancels["processing_time"] // 3
    assert (resends["num_requests"], resends["num_errors"], resends["last_error"]) == (0, 0, "")
    assert stats["started"].endswith("Z")


async def test_a_closed_service_is_not_discovered(world: BusWorld) -> None:
    bus = await world.bus("one")
    service = await bus.serve("runner", {RUNNER_CANCEL: cancel}, runner="r-1")
    subject = f"$SRV.PING.runner.{service.service_id}"
    assert len(await discover(bus, subject, 1)) == 1
    await service.close()
    await bus.flush()
    heard: Collector[Raw] = Collector()
    await bus.listen("discovery.again", heard)
    await bus.settle()
    await bus.send(Raw(subject, b"", "discovery.again"))
    (answer,) = await heard.wait(1)
    assert answer.headers["Status"] == "503"


async def test_an_error_answer_reads_without_our_code(world: BusWorld) -> None:
    """Any NATS client finds text and number in the headers of the protocol."""
    bus = await world.bus("one")
    await bus.serve("runner", {RUNNER_CANCEL: cancel}, runner="r-1")
    heard: Collector[Raw] = Collector()
    await bus.listen("answers.here", heard)
    await bus.settle()
    await bus.send(Raw(RUNNER_CANCEL.subject(bus.cluster, runner="r-1"), b'{"request_id":"refuse"}', "answers.here"))
    (answer,) = await heard.wait(1)
    assert dict(answer.headers) == {"Nats-Service-Error": "no such request", "Nats-Service-Error-Code": "40404"}
    assert json.loads(answer.body)["code"] == "command_not_found"


async def test_somebody_elses_error_answer_becomes_internal(world: BusWorld) -> None:
    asker, foreign = await world.bus("asker"), await world.bus("foreign")
    tasks: list[asyncio.Task[None]] = []

    def answer(question: Raw) -> None:
        headers = {"Nats-Service-Error": "went wrong", "Nats-Service-Error-Code": "418"}
        tasks.append(asyncio.create_task(foreign.send(Raw(question.reply, b"", "", headers))))

    await foreign.listen(RUNNER_CANCEL.subject(world.cluster, runner="r-1"), answer)
    await foreign.settle()
    with pytest.raises(SkulkError) as refused:
        await asker.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    assert (refused.value.code, refused.value.detail) == ("internal", "went wrong (418)")
    await asyncio.gather(*tasks)
