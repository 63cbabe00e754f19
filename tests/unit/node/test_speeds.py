"""How fast a node draws tokens: what is remembered over restarts, and what its beat tells."""

from __future__ import annotations

from pathlib import Path

import msgspec

from skulk.bus.subjects import MASTER_PLACE, RUNNER_STATUS
from skulk.node.speeds import FILE, MOST, SAVE_EVERY_S, SpeedBook
from skulk.wire.beats import MeasuredSpeed
from skulk.wire.commands import PlaceModel
from skulk.wire.placement import PlacementRequest
from tests.support.control_plane import running_node
from tests.support.states import card, status


def speed(tps: float, weights_bytes: int = 1000, backend: str = "llama_cpp-cpu") -> MeasuredSpeed:
    return MeasuredSpeed(backend=backend, weights_bytes=weights_bytes, decode_tps=tps)


def test_one_figure_for_each_backend_and_doubling_the_newest(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path)
    for one in (speed(10.0, 600), speed(11.0, 1000), speed(12.0, 1100), speed(40.0, 1000, "llama_cpp-cuda")):
        book.note(one)
    assert book.told == (speed(11.0, 1000), speed(12.0, 1100), speed(40.0, 1000, "llama_cpp-cuda"))


def test_what_says_nothing_is_left_out_and_the_oldest_goes(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path)
    book.note(speed(0.0))
    book.note(speed(5.0, 0))
    assert book.told == ()
    for doubling in range(MOST + 3):
        book.note(speed(1.0, 1 << doubling))
    assert [one.weights_bytes for one in book.told] == [1 << doubling for doubling in range(3, MOST + 3)]


def test_it_outlives_a_restart_and_is_written_once_a_minute(tmp_path: Path) -> None:
    book = SpeedBook(tmp_path)
    book.save(0.0)
    assert not (tmp_path / FILE).exists(), "nothing is new"
    book.note(speed(10.0))
    book.save(1.0)
    assert SpeedBook(tmp_path).told == (speed(10.0),)
    book.note(speed(20.0))
    book.save(2.0)
    assert SpeedBook(tmp_path).told == (speed(10.0),)
    book.save(1.0 + SAVE_EVERY_S)
    assert SpeedBook(tmp_path).told == (speed(20.0),)


def test_a_broken_file_and_a_folder_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    book = SpeedBook(tmp_path)
    assert book.told == ()
    lost = SpeedBook(tmp_path / "nowhere")
    lost.note(speed(10.0))
    lost.save(0.0)
    assert lost.told == (speed(10.0),)


async def test_the_beat_tells_what_a_runner_has_measured(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        node.node._speeds = SpeedBook(tmp_path)
        command = PlaceModel(command_id="c1", request=PlacementRequest(card=card(), context_length=2048))
        reply = await node.bus.request(MASTER_PLACE, command, timeout_s=10.0, node="aaaa")
        assert reply.assignment is not None
        told = status(reply.assignment, instance_id=reply.instance_id)
        ready = msgspec.structs.replace(told, decode_tps=33.0, since=node.bus.clock.wall() + 1.0)
        await node.bus.publish(RUNNER_STATUS, ready, runner=ready.runner_id)
        measured = speed(33.0, card().weights_bytes)
        assert await node.replica.wait_until(lambda view: view.nodes["aaaa"].beat.speeds == (measured,), 10.0)
    assert SpeedBook(tmp_path).told == (measured,)
