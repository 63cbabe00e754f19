"""One runner on the memory bus with the fake engine: what is answered, streamed, refused and ended, and how often."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from skulk.batching.rate import MAX_RUN, RUN_S
from skulk.batching.step import StepPlan, StepResult
from skulk.bus.subjects import GATEWAY_BEAT, RUNNER_RETIRE
from skulk.engines.fake import FakeOptions
from skulk.engines.protocol import Engine, GoOn, always
from skulk.errors import RequestError, ServiceError, UnavailableError
from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import (
    ChatMessage,
    ChatPrompt,
    Prompt,
    Resume,
    ResumedChoice,
    Retire,
    Sampling,
    TokenPrompt,
    Usage,
)
from tests.support.bus import ManualClock
from tests.support.runners import GATEWAY, RUNNER, fake_answer, generate_of, prompt_ids, runner_world


class Wrapped:
    """An engine with one method replaced by a test."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


class SlowPrompts(Wrapped):
    """Tokenising waits until the test lets it go on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.go_on = threading.Event()
        self.count = 0

    def tokens_of(self, prompt: Prompt) -> Sequence[int]:
        self.count += 1
        self.go_on.wait(20.0)
        return self._engine.tokens_of(prompt)


def into(engines: list[Any], kind: type[Wrapped]) -> Callable[[Engine], Engine]:
    """Wraps the engine in a ``kind`` and hands it to the test."""

    def wrap(engine: Engine) -> Engine:
        engines.append(kind(engine))
        return cast("Engine", engines[0])

    return wrap


def picky(engine: Engine) -> Engine:
    return cast("Engine", PickyEngine(engine))


def broken(engine: Engine) -> Engine:
    return cast("Engine", BrokenTokenizer(engine))


class SingleSteps(Wrapped):
    """Makes one step where several may be made."""

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        del go_on
        return self._engine.run(msgspec.structs.replace(plan, steps=1))


class AskedToGoOn(Wrapped):
    """Before its first run it asks whether it may go on until it may not, for ten seconds, and keeps the answers."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.answers: list[bool] = []

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        while plan.steps > 1 and len(self.answers) < 10_000 and all(self.answers[-1:]):
            self.answers.append(go_on())
            time.sleep(0.001)
        return self._engine.run(plan, go_on)


def single_steps(engine: Engine) -> Engine:
    return cast("Engine", SingleSteps(engine))


async def test_a_request_is_streamed_token_by_token_to_its_one_end(tmp_path: Path) -> None:
    """Where steps are long; quick ones follow one another in runs."""
    async with runner_world(tmp_path, wrap=single_steps) as world:
        stream = await world.generate(generate_of())
        assert (stream.accepted.prompt_tokens, stream.accepted.queued) == (6, 0)
        await stream.finish()
        assert stream.text() == fake_answer()
        assert stream.tokens == [*fake_answer().encode(), 256]
        assert [chunk.seq for chunk in stream.chunks] == list(range(50)), "48 tokens, the end token, the end"
        assert [chunk.finish_reason for chunk in stream.chunks[-2:]] == ["stop", None]
        assert stream.end.reason == "stop"
        assert stream.end.usage == Usage(prompt_tokens=6, completion_tokens=49)
        assert stream.end.timings is not None
        assert stream.end.timings.decode_s > 0.0


async def test_the_tokens_of_a_run_come_together(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        stream = await world.generate(generate_of())
        await stream.finish()
        assert stream.text() == fake_answer()
        assert stream.tokens == [*fake_answer().encode(), 256]
        counts = [len(chunk.tokens) for chunk in stream.chunks]
        assert counts[0] == 1, "the first token waits for no other"
        assert MAX_RUN in counts
        assert [chunk.finish_reason for chunk in stream.chunks[-2:]] == ["stop", None]


@pytest.mark.parametrize("why", ["a cancel", "another request", "its tokens are old"])
async def test_what_ends_a_run(tmp_path: Path, why: str) -> None:
    engines: list[AskedToGoOn] = []
    clock = ManualClock()
    async with runner_world(tmp_path, clock=clock, wrap=into(engines, AskedToGoOn)) as world:
        stream = await world.generate(generate_of())
        [engine] = engines
        async with asyncio.timeout(10.0):
            while len(engine.answers) < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert all(engine.answers)
        if why == "a cancel":
            await world.cancel("r1")
        elif why == "another request":
            await world.generate(generate_of("r2"))
        else:
            clock.time += RUN_S
        await stream.finish()
        assert stream.end.reason == ("cancelled" if why == "a cancel" else "stop")
        assert not engine.answers[-1], "the run would have gone on"


async def test_an_answer_that_takes_longer_than_a_step_may_is_no_hang(tmp_path: Path) -> None:
    options = FakeOptions(answer_tokens=24)
    async with runner_world(tmp_path, gated=True, options=options, step_timeout_s=1.0) as world:
        stream = await world.generate(generate_of())
        for _ in range(25):
            world.gate.let(1)
            await asyncio.sleep(0.1)
        await stream.finish()
        assert (stream.end.reason, len(stream.tokens)) == ("stop", 25)


async def test_many_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        names = [f"r{number}" for number in range(8)]
        streams = await asyncio.gather(*(world.generate(generate_of(name, f"prompt {name}")) for name in names))
        for name, stream in zip(names, streams, strict=True):
            assert (await stream.finish()).text() == fake_answer(f"prompt {name}")


async def test_limits_stops_and_choices(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        answer = fake_answer()
        limited = await (await world.generate(generate_of("a", max_tokens=5))).finish()
        assert limited.end.reason == "length"
        assert limited.text().encode() == answer.encode()[:5]
        stop = answer[10:14]
        stopped = await (await world.generate(generate_of("b", stop=(stop,)))).finish()
        assert stopped.end.reason == "stop"
        assert stopped.text() == answer[: answer.index(stop)]
        several = await (
            await world.generate(generate_of("c", n=3, sampling=Sampling(seed=1, temperature=1.0)))
        ).finish()
        assert len({several.text(choice) for choice in range(3)}) == 3
        assert sum(1 for chunk in several.chunks if chunk.finish_reason == "stop") == 3
        assert several.end.usage == Usage(prompt_tokens=6, completion_tokens=3 * 49)


async def test_what_cannot_be_served_is_refused_with_its_code(tmp_path: Path) -> None:
    async with runner_world(tmp_path, context_length=64, kv_cells=256) as world:
        with pytest.raises(RequestError, match=r"106 tokens.*64 tokens") as refused:
            await world.ask(generate_of(text="x" * 105))
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(RequestError) as refused:
            await world.ask(generate_of(text="x" * 30, max_tokens=60))
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(RequestError) as refused:
            await world.ask(generate_of(max_tokens=0))
        assert (refused.value.code, refused.value.param) == ("invalid_request", "max_tokens")
        with pytest.raises(RequestError) as refused:
            await world.ask(generate_of(prompt=ChatPrompt(messages=())))
        assert refused.value.code == "invalid_request"
        with pytest.raises(RequestError) as refused:
            await world.ask(generate_of(prompt=TokenPrompt(tokens=(1, 258))))
        assert refused.value.param == "prompt"
        clamped = await (await world.generate(generate_of("b", text="x" * 30))).finish()
        assert (clamped.end.reason, len(clamped.tokens)) == ("length", 33)


async def test_the_same_attempt_is_answered_the_same_and_run_once(tmp_path: Path) -> None:
    engines: list[SlowPrompts] = []
    async with runner_world(tmp_path, wrap=into(engines, SlowPrompts)) as world:
        asked = asyncio.create_task(world.generate(generate_of()))
        again = asyncio.create_task(world.ask(generate_of()))
        await world.statuses.until(lambda status: status.waiting == 1)
        engines[0].go_on.set()
        stream = await asked
        assert await again == stream.accepted
        await stream.finish()
        assert await world.ask(generate_of()) == stream.accepted
        assert engines[0].count == 1
        assert stream.text() == fake_answer()


async def test_a_newer_attempt_ends_the_older_one(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        first = await world.generate(generate_of())
        await world.gate.arrived(1)
        second = await world.generate(generate_of(attempt=2))
        world.gate.open()
        assert (await second.finish()).text() == fake_answer()
        await world.statuses.until(lambda status: status.active == 0)
        assert first.accepted.request_id == second.accepted.request_id


async def test_beyond_the_queue_is_overloaded_and_room_comes_back(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True, n_parallel=1, max_waiting=1) as world:
        first = await world.generate(generate_of("a"))
        second = await world.generate(generate_of("b"))
        with pytest.raises(UnavailableError) as refused:
            await world.ask(generate_of("c"))
        assert refused.value.code == "overloaded"
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1.0
        await world.statuses.until(lambda status: (status.active, status.waiting) == (1, 1))
        world.gate.open()
        await first.finish()
        await second.finish()
        assert (await (await world.generate(generate_of("c"))).finish()).end.reason == "stop"


async def test_a_cancel_ends_decode_within_one_step(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        stream = await world.generate(generate_of())
        world.gate.let(3)
        await world.gate.arrived(4)
        assert (await world.cancel("r1")).was_running
        assert (await world.cancel("r1")).was_running, "it ends with the step that is running"
        world.gate.let(1)
        await stream.finish()
        assert stream.end.reason == "cancelled"
        assert stream.end.usage == Usage(prompt_tokens=6, completion_tokens=4)
        assert world.gate.arrivals == 4
        assert not (await world.cancel("r1")).was_running


async def test_a_cancel_ends_prefill_within_one_step(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        stream = await world.generate(generate_of(text="x" * 900))
        await world.gate.arrived(1)
        await world.cancel("r1")
        world.gate.let(1)
        await stream.finish()
        assert (stream.end.reason, stream.tokens, world.gate.arrivals) == ("cancelled", [], 1)


async def test_a_cancel_ends_a_queued_request(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True, n_parallel=1) as world:
        first = await world.generate(generate_of("a"))
        await world.gate.arrived(1)
        second = await world.generate(generate_of("b"))
        await world.cancel("b")
        world.gate.let(1)
        assert (await second.finish()).end.reason == "cancelled"
        assert second.end.usage == Usage(prompt_tokens=6, completion_tokens=0)
        world.gate.open()
        assert (await first.finish()).text() == fake_answer()


async def test_a_cancel_ends_every_prompt_that_is_part_of_its_request(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        parts = [msgspec.structs.replace(generate_of(name), part_of="whole") for name in ("a", "b")]
        streams = [await world.generate(part) for part in parts]
        other = await world.generate(generate_of("c"))
        await world.gate.arrived(1)
        assert (await world.cancel("whole")).was_running
        world.gate.open()
        assert [(await stream.finish()).end.reason for stream in streams] == ["cancelled", "cancelled"]
        assert (await other.finish()).end.reason == "stop"


async def test_a_cancel_that_comes_before_the_tokens_still_ends_it(tmp_path: Path) -> None:
    engines: list[SlowPrompts] = []
    async with runner_world(tmp_path, wrap=into(engines, SlowPrompts)) as world:
        asked = asyncio.create_task(world.generate(generate_of()))
        await world.statuses.until(lambda status: status.waiting == 1)
        assert (await world.cancel("r1")).was_running
        engines[0].go_on.set()
        stream = await (await asked).finish()
        assert (stream.end.reason, stream.tokens) == ("cancelled", [])


async def test_what_its_caller_no_longer_waits_for_is_not_run(tmp_path: Path) -> None:
    engines: list[SlowPrompts] = []
    async with runner_world(tmp_path, wrap=into(engines, SlowPrompts), n_parallel=1, max_waiting=0) as world:
        with pytest.raises(ServiceError) as late:
            await world.ask(generate_of("a"), timeout_s=0.05)
        assert late.value.code == "deadline_exceeded"
        await world.statuses.until(lambda status: status.waiting == 1)
        with pytest.raises(UnavailableError):
            await world.ask(generate_of("b"))
        engines[0].go_on.set()
        await world.statuses.until(lambda status: status.waiting == 0)
        assert (await (await world.generate(generate_of("b"))).finish()).end.reason == "stop"
        assert engines[0].count == 2, "the refused ones were not even tokenised"


async def test_the_deadline_ends_the_stream(tmp_path: Path) -> None:
    clock = ManualClock()
    async with runner_world(tmp_path, gated=True, clock=clock) as world:
        stream = await world.generate(generate_of(timeout_s=5.0))
        other = await world.generate(generate_of("other"))
        world.gate.let(2)
        await world.gate.arrived(3)
        clock.time += 5.0
        world.gate.let(1)
        await stream.finish()
        assert (stream.end.reason, stream.error_code) == ("error", "deadline_exceeded")
        world.gate.open()
        assert (await other.finish()).end.reason == "stop"


async def test_a_deadline_during_preparation_is_a_refusal(tmp_path: Path) -> None:
    engines: list[SlowPrompts] = []
    async with runner_world(tmp_path, wrap=into(engines, SlowPrompts)) as world:
        with pytest.raises(ServiceError) as late:
            await world.ask(generate_of(timeout_s=0.05))
        assert late.value.code == "deadline_exceeded"
        engines[0].go_on.set()
        assert (await (await world.generate(generate_of("b"))).finish()).end.reason == "stop"


async def test_requests_of_a_gateway_in_another_life_are_cancelled(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        stream = await world.generate(generate_of())
        await world.gate.arrived(1)
        beat = GatewayBeat(gateway_id=GATEWAY, incarnation="life2", node_id="node", at=0.0)
        await world.bus.publish(GATEWAY_BEAT, beat, gateway=GATEWAY)
        # A step now and then, far from enough for the whole answer: the cancel must come from the upkeep.
        while not stream.chunks or stream.chunks[-1].end is None:
            world.gate.let(1)
            stream.chunks.extend(await stream.reader.take())
            await asyncio.sleep(0.05)
        assert stream.end.reason == "cancelled"


async def test_a_resumed_answer_goes_on_where_it_was(tmp_path: Path) -> None:
    answer = fake_answer()
    ids = tuple(answer.encode()[:20])
    sent = len(answer.encode()[:17].decode("utf-8", "ignore"))
    resume = Resume(prompt_tokens=prompt_ids(), emitted_tokens=ids, sent_characters=sent)
    async with runner_world(tmp_path) as world:
        stream = await (await world.generate(generate_of(attempt=2, resume=resume))).finish()
        assert answer[:sent] + stream.text() == answer
        assert stream.end.usage == Usage(prompt_tokens=6, completion_tokens=49)


class PickyEngine(Wrapped):
    """Refuses to begin sequences with a seed."""

    def begin(
        self,
        slot: int,
        sampling: Sampling,
        history: Sequence[int],
        *,
        drawn: int = 0,
        choice: int = 0,
        parked: int = 0,
    ) -> None:
        if sampling.seed is not None and choice == 1:
            raise RequestError("invalid_request", "no seeds, please", param="seed")
        self._engine.begin(slot, sampling, history, drawn=drawn, choice=choice, parked=parked)


async def test_what_the_engine_will_not_begin_ends_alone(tmp_path: Path) -> None:
    async with runner_world(tmp_path, wrap=picky) as world:
        refused = await (await world.generate(generate_of("a", sampling=Sampling(seed=1), n=3))).finish()
        assert refused.error_code == "invalid_request"
        assert (await (await world.generate(generate_of("b"))).finish()).text() == fake_answer()


async def test_a_grammar_that_the_engine_refuses_is_refused_before_anything_is_accepted(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        with pytest.raises(RequestError, match="has none") as refused:
            await world.generate(generate_of(sampling=Sampling(grammar='root ::= "a"')))
        assert (refused.value.code, refused.value.param) == ("unsupported_field", "grammar")
        assert (await (await world.generate(generate_of("b"))).finish()).text() == fake_answer()


class BrokenTokenizer(Wrapped):
    def tokens_of(self, prompt: Prompt) -> Sequence[int]:
        if prompt == generate_of().prompt:
            raise ZeroDivisionError
        return self._engine.tokens_of(prompt)


async def test_a_defect_of_the_tokenizer_is_one_request_s_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with runner_world(tmp_path, wrap=broken) as world:
        with pytest.raises(ServiceError, match="ZeroDivisionError") as failed:
            await world.ask(generate_of())
        assert failed.value.code == "internal"
        assert "could not be tokenised" in caplog.text
        chat = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))
        assert (await (await world.generate(generate_of(prompt=chat))).finish()).end.reason == "stop"


async def test_alive_tells_phase_progress_and_the_age_of_the_step(tmp_path: Path) -> None:
    # The bus counts deadlines on the machine's clock, which must not be behind this one.
    clock = ManualClock(0.0)
    async with runner_world(tmp_path, gated=True, clock=clock, options=FakeOptions(answer_tokens=5)) as world:
        clock.time += 30.0
        stream = await world.generate(generate_of(text="x" * 199))
        world.gate.let(1)
        await world.gate.arrived(2)
        clock.time += 3.0
        async with asyncio.timeout(20.0):
            # The inbox tells nobody of an alive message.
            while (state := stream.reader.state) is None or state.step_age_s < 3.0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (state.phase, state.processed, state.total) == ("prefill", 64, 200)
        assert state.step_age_s == 3.0, "idle time before the request doesn't count"
        world.gate.open()
        await stream.finish()


async def test_a_runner_retires_only_while_nothing_is_in_flight(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:

        async def retire(hold_s: float) -> bool:
            answer = await world.bus.request(RUNNER_RETIRE, Retire(hold_s=hold_s), timeout_s=5.0, runner=RUNNER)
            return answer.is_idle

        stream = await world.generate(generate_of("a"))
        assert not await retire(60.0)
        world.gate.open()
        assert (await stream.finish()).text() == fake_answer()
        await world.statuses.until(lambda status: status.active == 0)
        assert await retire(0.05)
        with pytest.raises(UnavailableError) as refused:
            await world.ask(generate_of("b"))
        assert refused.value.code == "draining"
        await asyncio.sleep(0.06)  # whoever asked did not stop it: it serves again
        await (await world.generate(generate_of("c"))).finish()


async def test_a_resumed_request_goes_on_with_all_of_its_choices(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"n": 3, "sampling": Sampling(seed=5)}
    async with runner_world(tmp_path) as world:
        whole = await (await world.generate(generate_of("a", **asked))).finish()
        ids = [[token for chunk in whole.chunks if chunk.choice == at for token in chunk.tokens] for at in range(3)]
        first, *others = (
            ResumedChoice(emitted_tokens=tuple(ids[at][:cut]), sent_characters=len(bytes(ids[at][:sent]).decode()))
            for at, (cut, sent) in enumerate(((9, 4), (49, 0), (0, 0)))
        )
        resume = Resume(
            prompt_tokens=prompt_ids(),
            emitted_tokens=first.emitted_tokens,
            sent_characters=first.sent_characters,
            others=tuple(others),
        )
        again = await (await world.generate(generate_of("b", attempt=2, resume=resume, **asked))).finish()
        texts = [whole.text(0)[first.sent_characters :], whole.text(1), whole.text(2)]
        assert [again.text(at) for at in range(3)] == texts
        assert again.end.usage is not None
        assert whole.end.usage is not None
        assert again.end.usage.completion_tokens == whole.end.usage.completion_tokens
