"""The calls about weights over real sockets, against a scripted store of a node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.wire.base import ErrorBody
from skulk.wire.model import HeldModel
from skulk.wire.store import (
    DownloadStatus,
)
from tests.support.http import MODEL, NODE, Gateway, running_gateway
from tests.support.stores import FAR, HUB_MODEL, FakeStore

SHARD = {"PipelineShardMetadata": {"modelCard": {"modelId": HUB_MODEL}, "deviceRank": 0, "worldSize": 1}}


class Stored:
    """A gateway, and the store behind it."""

    def __init__(self, gateway: Gateway, store: FakeStore) -> None:
        self.gateway = gateway
        self.store = store
        self.call = gateway.call

    async def beat(self, **fields: Any) -> None:
        """The node says this of itself from now on."""
        more = self.gateway.cluster.more_of_beat
        more.update(fields)
        await self.gateway.cluster.beat()
        await self.gateway.sees(
            lambda view: all(getattr(view.nodes[NODE].beat, name) == value for name, value in fields.items())
        )

    async def downloading(self, phase: Any, **fields: Any) -> None:
        await self.beat(downloads=(DownloadStatus(model_id=HUB_MODEL, phase=phase, **fields),))


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[Stored]:
    async with running_gateway(tmp_path) as gateway:
        store = FakeStore()
        await store.start(gateway.cluster.bus)
        found = Stored(gateway, store)
        await found.beat(hub=True)
        yield found
        await store.service.close(drain_s=0.0)


async def test_what_lies_on_another_node_is_listed_by_its_card(stored: Stored) -> None:
    held = HeldModel(model_id=HUB_MODEL, size_bytes=100)
    await stored.beat(models=(held,))
    for _ in range(2):
        listed = (await stored.call("GET", "/v1/models")).json["data"]
        assert (HUB_MODEL, "downloaded") in [(one["id"], one["state"]) for one in listed]
    shown = await stored.call("GET", f"/v1/models/{HUB_MODEL}")
    assert (shown.status, shown.json["id"]) == (200, HUB_MODEL)
    found = await stored.call("GET", "/models/search?query=far&hub=0")
    assert [one["id"] for one in found.json["data"]] == [HUB_MODEL]
    assert len(stored.store.asked) == 1, "its card was asked for once"
    await stored.beat(models=())
    listed = (await stored.call("GET", "/v1/models")).json["data"]
    assert HUB_MODEL not in [one["id"] for one in listed]


async def test_a_node_that_does_not_tell_its_card_hides_no_other_model(stored: Stored) -> None:
    stored.store.refusal = UnavailableError("hub_unreachable", "it is silent")
    await stored.beat(models=(HeldModel(model_id=HUB_MODEL, size_bytes=100),))
    answer = await stored.call("GET", "/v1/models")
    assert (answer.status, [one["id"] for one in answer.json["data"]]) == (200, [MODEL])


async def test_a_model_of_the_hub_is_placed_with_its_pins_in_the_state(stored: Stored) -> None:
    answer = await stored.call("POST", "/place_instance", {"model_id": HUB_MODEL})
    assert answer.status == 200, answer.json
    (command,) = stored.gateway.cluster.placed
    assert (command.request.card.repo, command.request.card.revision) == ("org/far-GGUF", "c0ffee")
    preview = await stored.call("GET", f"/instance/previews?model_id={HUB_MODEL}")
    assert preview.json["previews"][0]["model_id"] == HUB_MODEL


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (RequestError("model_gated", "gated: ask for access"), 403, "model_gated"),
        (RequestError("model_renamed", "is called b/c now"), 404, "model_renamed"),
        (RequestError("model_not_found", "the hub has none"), 404, "model_not_found"),
        (RequestError("quantization_not_found", "it has Q4_K_M"), 404, "quantization_not_found"),
        (UnavailableError("hub_rate_limited", "for 7 s", retry_after_s=7), 503, "hub_rate_limited"),
        (UnavailableError("hub_unreachable", "no network"), 404, "model_not_found"),
    ],
)
async def test_what_the_hub_says_has_its_own_code(stored: Stored, refusal: SkulkError, status: int, code: str) -> None:
    stored.store.refusal = refusal
    answer = await stored.call("POST", "/place_instance", {"model_id": HUB_MODEL})
    assert (answer.status, answer.error["code"], answer.error["param"] in ("model_id", None)) == (status, code, True)
    assert refusal.detail in answer.error["message"]
    assert code != "model_not_found" or "GET /models/search?query=" in answer.error["message"]
    assert status != 503 or answer.headers["Retry-After"] == "7"


async def test_a_cluster_without_a_hub_asks_nobody(stored: Stored) -> None:
    await stored.beat(hub=False)
    answer = await stored.call("POST", "/place_instance", {"model_id": HUB_MODEL})
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert (await stored.call("GET", "/models/search?query=far")).json["data"] == []
    assert stored.store.asked == []


async def test_a_model_on_another_node_s_disk_is_placed_by_that_node_s_card(stored: Stored) -> None:
    held = msgspec.structs.replace(stored.gateway.view.nodes[NODE].beat.models[0], model_id="bare")
    await stored.beat(hub=False, models=(held,))
    answer = await stored.call("POST", "/place_instance", {"model_id": "bare"})
    assert answer.status == 200, answer.json
    assert stored.gateway.cluster.placed[0].request.card == FAR
    assert [asked.name for asked in stored.store.asked] == ["bare"]


async def test_search_tells_the_known_ones_first_and_the_hub_s_silence(stored: Stored) -> None:
    found = (await stored.call("GET", "/models/search?query=SmolLM2")).json
    assert [entry["id"] for entry in found["data"]] == [MODEL, "org/far-GGUF"]
    stored.store.refusal = UnavailableError("hub_unreachable", "no network")
    found = (await stored.call("GET", "/models/search?query=SmolLM2")).json
    assert [entry["id"] for entry in found["data"]] == [MODEL]
    assert found["hub_error"] == {"code": "hub_unreachable", "message": "no network"}
    assert (await stored.call("GET", "/models/search?query=SmolLM2&hub=0")).json.keys() == {"object", "data"}


async def test_add_keeps_the_card(stored: Stored) -> None:
    answer = await stored.call("POST", "/models/add", {"model_id": HUB_MODEL})
    assert (answer.status, answer.json["id"], answer.json["state"]) == (200, HUB_MODEL, "available")
    assert stored.store.asked[-1].card == FAR
    assert (await stored.call("POST", "/models/add", {})).error["param"] == "model_id"


async def test_download_start_as_existing_clients_send_it(stored: Stored) -> None:
    body = {"targetNodeId": NODE, "shardMetadata": SHARD}
    for _ in range(2):
        answer = await stored.call("POST", "/download/start", body)
        assert (answer.status, answer.json["status"]) == (200, "queued")
    assert stored.store.asked[-1].card == FAR
    wrong = await stored.call("POST", "/download/start", {"targetNodeId": NODE, "shardMetadata": {"X": {}}})
    assert (wrong.status, wrong.error["param"]) == (400, "shardMetadata")
    gone = await stored.call("POST", "/download/start", {**body, "targetNodeId": "nobody"})
    assert (gone.status, gone.error["code"]) == (404, "node_not_found")


async def test_a_download_is_ended_while_it_runs_and_deleted_when_it_is_there(stored: Stored) -> None:
    await stored.downloading("fetching")
    answer = await stored.call("DELETE", f"/download/{NODE}/{HUB_MODEL}")
    assert (answer.status, answer.json["status"]) == (200, "cancelled")
    await stored.beat(downloads=())
    answer = await stored.call("DELETE", f"/download/{NODE}/{HUB_MODEL}")
    assert (answer.status, answer.json["freed_bytes"]) == (200, 7)


async def test_state_tells_downloads_by_their_tags(stored: Stored) -> None:
    await stored.downloading("fetching", done_bytes=40, total_bytes=100, speed=8.0, eta_s=7.5, sources=("hub",))
    (held, ongoing) = (await stored.call("GET", "/state")).json["downloads"][NODE]
    assert set(held) == {"DownloadCompleted"}
    progress = ongoing["DownloadOngoing"]["downloadProgress"]
    assert progress["total"] == {"inBytes": 100} and progress["downloaded"] == {"inBytes": 40}
    assert (progress["speed"], progress["etaMs"]) == (8.0, 7500)
    await stored.downloading("waiting")
    assert "DownloadPending" in (await stored.call("GET", "/state")).json["downloads"][NODE][1]
    await stored.downloading("failed", error=ErrorBody(code="disk_full", detail="too small"))
    failed = (await stored.call("GET", "/state")).json["downloads"][NODE][1]
    assert failed["DownloadFailed"]["errorMessage"] == "too small"


async def test_the_store_s_status_and_registry(stored: Stored) -> None:
    path = f"/store/models/{HUB_MODEL}/download"
    assert (await stored.call("GET", path + "/status")).error["code"] == "download_not_found"
    answer = await stored.call("POST", path, {"pinned": True})
    assert (answer.json["status"], stored.store.asked[-1].pinned) == ("queued", True)
    assert (await stored.call("POST", path)).json["status"] == "queued"
    await stored.downloading("fetching", done_bytes=1, total_bytes=2)
    assert (await stored.call("GET", path + "/status")).json["status"] == "downloading"
    await stored.downloading("failed", error=ErrorBody(code="disk_full", detail="too small"))
    told = (await stored.call("GET", path + "/status")).json
    assert (told["status"], told["error"]["code"]) == ("failed", "disk_full")
    assert (await stored.call("GET", f"/store/models/{MODEL}/download/status")).json["status"] == "completed"
    (entry,) = (await stored.call("GET", "/store/registry")).json["entries"]
    assert (entry["model_id"], entry["nodes"]) == (MODEL, [NODE]) and entry.keys() >= {"total_bytes", "downloaded_at"}


async def test_verify_and_remove_reach_every_node_that_has_it(stored: Stored) -> None:
    answer = await stored.call("POST", f"/store/models/{MODEL}/verify")
    assert answer.json["results"][0] | {"files": []} == {
        "node_id": NODE, "model_id": MODEL, "problem": "", "is_pinned": True, "files": []
    }  # fmt: skip
    answer = await stored.call("DELETE", f"/store/models/{MODEL}")
    assert answer.json == {
        "model_id": MODEL, "removed": [{"node_id": NODE, "model_id": MODEL, "freed_bytes": 7}]
    }  # fmt: skip
    assert (await stored.call("DELETE", "/store/models/org/none")).error["code"] == "model_not_found"
    stored.store.refusal = RequestError("model_in_use", "it is placed")
    assert (await stored.call("DELETE", f"/store/models/{MODEL}")).error["code"] == "model_in_use"
