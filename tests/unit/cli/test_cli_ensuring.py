"""``--place`` where no master can be asked: the node serves without, and the models are placed later."""

from __future__ import annotations

import asyncio

import pytest

from skulk.cli.ensuring import ensure_now, keep_ensuring
from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.wire.commands import PlacementReply
from skulk.wire.placement import PlacementDecision, PlacementRequest
from tests.support.states import card, state_of

UNREACHABLE = UnavailableError("master_unreachable", "others hear the master, this node doesn't")
REFUSED = RequestError("model_not_found", "nobody knows it")
ONE, TWO = (PlacementRequest(card=card(f"org/{name}")) for name in ("one", "two"))


class ScriptedMaster:
    """Fails as it is told, call by call, then answers."""

    def __init__(self, *failures: SkulkError | None) -> None:
        self.failures = list(failures)
        self.asked: list[str] = []

    async def ensure(self, request: PlacementRequest) -> PlacementReply:
        self.asked.append(request.card.model_id)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        decision = PlacementDecision(outcome="placed", reason=f"{request.card.model_id} is here")
        return PlacementReply(command_id="c", instance_id="i1", decision=decision, position=state_of().position)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.cli.ensuring.ASK_AGAIN_S", 0.0)


async def test_each_model_is_asked_for_in_turn() -> None:
    master = ScriptedMaster()
    replies, left = await ensure_now(master.ensure, (ONE, TWO))
    assert [reply.decision.reason for reply in replies] == ["org/one is here", "org/two is here"]
    assert (left, master.asked) == ((), ["org/one", "org/two"])


@pytest.mark.parametrize("code", ["no_master", "master_unreachable"])
async def test_without_a_master_nothing_fails_and_nobody_waits_twice(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    master = ScriptedMaster(UnavailableError(code, "nobody leads"))
    assert await ensure_now(master.ensure, (ONE, TWO)) == ((), (ONE, TWO))
    assert master.asked == ["org/one"]
    assert "org/one, org/two will be placed when a master can be asked: nobody leads" in caplog.text


async def test_a_refusal_at_the_start_is_the_starters() -> None:
    with pytest.raises(RequestError, match="nobody knows it"):
        await ensure_now(ScriptedMaster(REFUSED).ensure, (ONE,))


async def test_it_is_asked_again_until_each_model_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    master = ScriptedMaster(UNREACHABLE, UNREACHABLE, None, UNREACHABLE)
    await asyncio.wait_for(keep_ensuring(master.ensure, (ONE, TWO)), 5.0)
    assert master.asked == [*["org/one"] * 3, *["org/two"] * 2]
    assert "org/one is here" in caplog.text and "org/two is here" in caplog.text


async def test_a_later_refusal_is_told_and_the_others_are_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    master = ScriptedMaster(REFUSED)
    await asyncio.wait_for(keep_ensuring(master.ensure, (ONE, TWO)), 5.0)
    assert master.asked == ["org/one", "org/two"]
    assert "org/one is not placed: nobody knows it" in caplog.text
