"""The real huggingface_hub client against the small hub: names become pinned cards, failures their own errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.models import hub as hub_module
from skulk.models.hub import Hub
from skulk.models.reference import parse_reference
from skulk.models.resolving import resolve
from skulk.wire.model import ModelCard
from tests.support.gguf import TENSORS, Tensor, gguf_bytes, llama_metadata
from tests.support.hub import COMMIT, SmallHub

REPO = "org/tiny-GGUF"
Q4 = gguf_bytes(llama_metadata(general__file_type=3), TENSORS)
Q8 = gguf_bytes(llama_metadata(general__file_type=7), (*TENSORS, Tensor("more.weight", (64, 10), 8)))


@pytest.fixture
def small_hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        hub.add(REPO, {"tiny-Q4_0.gguf": Q4, "tiny-Q8_0.gguf": Q8, "README.md": b"hello", "evil.py": b"import os"})
        yield hub


def card_of(small_hub: SmallHub, name: str, token: str = "") -> ModelCard:
    return resolve(Hub(endpoint=small_hub.url, token=token), parse_reference(name))


def test_a_name_becomes_a_card_that_pins_commit_and_hashes_before_any_weight_is_fetched(small_hub: SmallHub) -> None:
    card = card_of(small_hub, f"{REPO}:Q8_0")
    assert (card.model_id, card.repo, card.revision) == (f"{REPO}:Q8_0", REPO, COMMIT)
    (file,) = card.files
    assert (file.name, file.size_bytes, file.sha256) == ("tiny-Q8_0.gguf", len(Q8), hashlib.sha256(Q8).hexdigest())
    assert (card.quantization, card.context_length, card.layers) == ("Q8_0", 2048, 4)
    assert card.weights_bytes == sum(tensor.size_bytes for tensor in (*TENSORS, Tensor("m", (64, 10), 8)))
    assert all(seen.range for seen in small_hub.content_calls)
    assert set(small_hub.sent) == {"tiny-Q8_0.gguf"}


def test_the_preferred_quantization_of_a_plain_name(small_hub: SmallHub) -> None:
    assert card_of(small_hub, REPO).files[0].name == "tiny-Q4_0.gguf"


def test_only_the_header_of_a_large_file_is_read(small_hub: SmallHub) -> None:
    large = gguf_bytes(llama_metadata(), (Tensor("w", (1024, 2048), 0),))
    small_hub.add("org/large", {"m-F32.gguf": large})
    card = card_of(small_hub, "org/large")
    assert card.weights_bytes == 1024 * 2048 * 4
    assert small_hub.sent_bytes < len(large) // 4


def test_the_parts_of_a_model_are_added_up(small_hub: SmallHub) -> None:
    small_hub.add("org/parts", {f"m-Q8_0-0000{part}-of-00002.gguf": Q8 for part in (1, 2)})
    card = card_of(small_hub, "org/parts")
    assert len(card.files) == 2
    assert card.weights_bytes == 2 * card_of(small_hub, f"{REPO}:Q8_0").weights_bytes


def test_a_list_of_many_pages_is_read_to_its_end(small_hub: SmallHub) -> None:
    small_hub.page_size = 2
    files = {f"a{number:02}.json": b"{}" for number in range(9)}
    small_hub.add("org/pages", {**files, "z-Q4_0.gguf": Q4})
    assert card_of(small_hub, "org/pages").files[0].name == "z-Q4_0.gguf"
    assert len([seen for seen in small_hub.seen if "/tree/" in seen.path]) == 5


def test_a_revision_that_was_asked_for(small_hub: SmallHub) -> None:
    small_hub.add("org/rev", {"m-Q4_0.gguf": Q4}, commit="ab" * 20)
    card = card_of(small_hub, "org/rev@main")
    assert (card.model_id, card.revision) == ("org/rev@main", "ab" * 20)
    with pytest.raises(RequestError, match="no revision 'v9'") as caught:
        card_of(small_hub, "org/rev@v9")
    assert caught.value.code == "revision_not_found"


def test_a_vision_model_is_known_by_its_projector_or_by_its_configuration(small_hub: SmallHub) -> None:
    small_hub.add("org/eyes", {"m-Q4_0.gguf": Q4, "mmproj-F16.gguf": Q8, "mmproj-F32.gguf": Q8})
    card = card_of(small_hub, "org/eyes")
    assert card.capabilities == ("text", "vision")
    assert card.projector is not None and card.projector.name == "mmproj-F16.gguf"
    assert card.size_bytes == len(Q4) + len(Q8)
    config = json.dumps({"model_type": "llava", "vision_config": {"hidden_size": 1}}).encode()
    small_hub.add("org/config", {"m-Q4_0.gguf": Q4, "config.json": config})
    assert "vision" in card_of(small_hub, "org/config").capabilities
    assert "vision" not in card_of(small_hub, REPO).capabilities


def test_an_mlx_model_by_its_configuration_and_its_index(small_hub: SmallHub) -> None:
    config = {
        "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 99,
        "quantization": {"bits": 4, "group_size": 64},
    }  # fmt: skip
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    small_hub.add(
        "mlx/q",
        {
            "config.json": json.dumps(config).encode(),
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00001.safetensors": b"x" * 5000,
            "tokenizer.json": b"{}",
            "modeling_qwen.py": b"import os",
        },
    )
    card = card_of(small_hub, "mlx/q")
    assert (card.format, card.backends, card.quantization) == ("mlx", ("mlx-metal",), "4bit")
    assert (card.weights_bytes, card.kv_bytes_per_token) == (12345, 4 * 2 * 2 * 8 * 2)
    names = {file.name for file in card.all_files}
    assert names == {
        "config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "tokenizer.json"
    }  # fmt: skip
    assert all(file.git_oid for file in card.companions)


def test_a_server_without_ranges_still_gives_the_header(small_hub: SmallHub) -> None:
    small_hub.ignores_ranges = True
    assert card_of(small_hub, REPO).layers == 4


def test_the_token_goes_to_the_hub_and_not_to_the_store_it_redirects_to(small_hub: SmallHub) -> None:
    card_of(small_hub, REPO, token="hf_secret")
    by_place = {seen.path.split("/")[1]: seen.authorization for seen in small_hub.seen}
    assert by_place["api"] == by_place["org"] == "Bearer hf_secret"
    assert by_place["store"] == ""


def gated(small_hub: SmallHub) -> None:
    small_hub.repositories[REPO].gated = True


def private(small_hub: SmallHub) -> None:
    small_hub.repositories[REPO].private = True


def missing(small_hub: SmallHub) -> None:
    del small_hub.repositories[REPO]


def renamed(small_hub: SmallHub) -> None:
    small_hub.repositories["new/name"] = small_hub.add("x/y", {"m-Q4_0.gguf": Q4})
    small_hub.repositories[REPO].moved_to = "new/name"


def busy(small_hub: SmallHub) -> None:
    small_hub.busy = 1


def broken(small_hub: SmallHub) -> None:
    small_hub.broken = 1


def spoiled_header(small_hub: SmallHub) -> None:
    small_hub.repositories[REPO].files["tiny-Q4_0.gguf"] = b"GGUX" + bytes(5000)


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (gated, "model_gated", "ask for access"),
        (private, "model_not_found", "HF_TOKEN"),
        (missing, "model_not_found", "check the name"),
        (renamed, "model_renamed", "is called new/name now"),
        (busy, "hub_rate_limited", "for 7 s"),
        (broken, "hub_failed", "500"),
        (spoiled_header, "model_file_invalid", "not a GGUF"),
    ],
)
def test_each_failure_of_the_hub_has_its_own_error(
    small_hub: SmallHub, failure: Callable[[SmallHub], None], code: str, says: str
) -> None:
    failure(small_hub)
    with pytest.raises(SkulkError, match=says) as caught:
        card_of(small_hub, REPO)
    assert caught.value.code == code
    assert REPO in caught.value.detail or code in ("hub_rate_limited", "model_file_invalid")


def test_a_limited_rate_says_when_to_come_back(small_hub: SmallHub) -> None:
    small_hub.busy = 1
    with pytest.raises(UnavailableError) as caught:
        card_of(small_hub, REPO)
    assert caught.value.retry_after_s == 7


def test_a_hub_that_is_not_there_or_says_nothing(monkeypatch: pytest.MonkeyPatch, small_hub: SmallHub) -> None:
    with pytest.raises(UnavailableError) as caught:
        resolve(Hub(endpoint="http://127.0.0.1:9"), parse_reference(REPO))
    assert caught.value.code == "hub_unreachable"
    monkeypatch.setattr(hub_module, "ANSWER_S", 0.2)
    small_hub.stalls = True
    small_hub.repositories[REPO].files["tiny-Q4_0.gguf"] = Q4 + bytes(200_000)
    with pytest.raises(UnavailableError) as caught:
        card_of(small_hub, REPO)
    assert caught.value.code == "hub_unreachable"


def test_a_gated_repository_opens_with_the_token(small_hub: SmallHub) -> None:
    small_hub.repositories[REPO].gated = True
    assert card_of(small_hub, REPO, token="hf_x").model_id == REPO


def test_search_tells_repositories(small_hub: SmallHub) -> None:
    found: Any = Hub(endpoint=small_hub.url).search("tiny", 5)
    assert [one.repo for one in found] == [REPO]
