"""subjects.toml equals the typed registry; the grammar holds; no subject can be taken for another one."""

from __future__ import annotations

import itertools
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.bus import transport
from skulk.bus.subjects import CHANNELS, ENDPOINTS, PREFIX, Channel, Endpoint, Template
from skulk.errors import RequestError
from skulk.ids import TOKEN
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import NodeBeat
from tests.support.contract import toml

CONTRACT = toml("subjects.toml")
TEMPLATES: tuple[Template, ...] = (*CHANNELS, *ENDPOINTS)
ROLES = {"node", "master", "gateway", "runner"}


def test_the_head_of_the_file_is_the_registry_s() -> None:
    assert CONTRACT["protocol"] == PROTOCOL
    assert CONTRACT["prefix"] == PREFIX
    assert CONTRACT["token"] == TOKEN.pattern


def test_a_beat_speaks_the_protocol_of_its_registry_by_default() -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(NodeBeat)}
    assert defaults["protocol"] == PROTOCOL


def test_the_same_channels_and_endpoints_stand_in_both_in_the_same_order() -> None:
    assert list(CONTRACT["channels"]) == [channel.name for channel in CHANNELS]
    assert list(CONTRACT["endpoints"]) == [endpoint.name for endpoint in ENDPOINTS]


@pytest.mark.parametrize("channel", CHANNELS, ids=lambda channel: channel.name)
def test_a_channel_is_the_same_in_both(channel: Channel[Any]) -> None:
    entry = CONTRACT["channels"][channel.name]
    assert entry["subject"] == channel.full
    assert entry["payload"] == channel.payload.__name__


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_an_endpoint_is_the_same_in_both(endpoint: Endpoint[Any, Any]) -> None:
    entry = CONTRACT["endpoints"][endpoint.name]
    assert entry["subject"] == endpoint.full
    assert entry["service"] == endpoint.service
    assert entry["request"] == endpoint.request.__name__
    assert entry["reply"] == endpoint.reply.__name__
    assert entry["queue_group"] == endpoint.queue_group


@pytest.mark.parametrize("name", [*CONTRACT["channels"], *CONTRACT["endpoints"]])
def test_every_entry_says_who_speaks_who_listens_and_what_is_promised(name: str) -> None:
    entry = CONTRACT["channels"].get(name) or CONTRACT["endpoints"][name]
    assert entry["publishers"]
    assert entry["subscribers"]
    assert set(entry["publishers"]) | set(entry["subscribers"]) <= ROLES
    assert entry["guarantee"].endswith((".", "'"))
    assert entry["description"]


def test_every_id_is_explained_and_every_explanation_used() -> None:
    used = {"cluster", *itertools.chain.from_iterable(template.ids for template in TEMPLATES)}
    assert set(CONTRACT["ids"]) == used


def test_the_headers_are_those_that_the_bus_uses() -> None:
    used = {transport.REMAINING_MS, transport.PARCEL, transport.SERVICE_ERROR, transport.SERVICE_ERROR_CODE}
    assert set(CONTRACT["headers"]) == used | {transport.MESSAGE_ID}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.text)
def test_the_grammar(template: Template) -> None:
    prefix, cluster, version, *rest = template.full.split(".")
    assert (prefix, cluster, version) == (PREFIX, "{cluster}", f"v{PROTOCOL}")
    assert len(rest) >= 2, "a subject has a plane and a noun"
    for token in rest:
        assert TOKEN.fullmatch(token) or re.fullmatch(r"\{[a-z]+\}", token)
    assert TOKEN.fullmatch(rest[0]), "the plane is fixed: permissions are written by it"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_the_endpoints_of_a_service_differ_in_the_noun_alone(endpoint: Endpoint[Any, Any]) -> None:
    brothers = [other for other in ENDPOINTS if other.service == endpoint.service]
    assert {(other.plane, other.ids, other.queue_group) for other in brothers} == {
        (endpoint.plane, endpoint.ids, endpoint.queue_group)
    }
    assert len({other.noun for other in brothers}) == len(brothers)
    assert {other.service for other in ENDPOINTS if other.plane == endpoint.plane} == {endpoint.service}


def may_meet(one: Template, other: Template) -> bool:
    """Whether some subject is of both templates, as a broker's wildcards see it."""
    tokens = one.pattern("c").split("."), other.pattern("c").split(".")
    if len(tokens[0]) != len(tokens[1]):
        return False
    return all(left == right or "*" in (left, right) for left, right in zip(*tokens, strict=True))


def test_no_subject_is_of_two_templates() -> None:
    """So that one permission allows one thing, and a wildcard subscription hears one kind of message."""
    meeting = [(a.text, b.text) for a, b in itertools.combinations(TEMPLATES, 2) if may_meet(a, b)]
    assert meeting == []


def test_what_meets_is_seen() -> None:
    assert may_meet(Template("beat.{kind}.{id}"), Template("beat.node.{node}"))
    assert not may_meet(Template("beat.node"), Template("beat.node.{node}"))


tokens = st.from_regex(TOKEN, fullmatch=True)


@given(template=st.sampled_from(TEMPLATES), cluster=tokens, data=st.data())
def test_a_subject_is_parsed_to_the_ids_it_was_made_of(template: Template, cluster: str, data: st.DataObject) -> None:
    ids = {name: data.draw(tokens) for name in template.ids}
    subject = template.subject(cluster, **ids)
    assert template.parse(subject) == {"cluster": cluster, **ids}
    assert [other.text for other in TEMPLATES if other.parse(subject) is not None] == [template.text]


@pytest.mark.parametrize("bad", ["", "a.b", "A", "*", ">", "a b", "é", "a\n"])
def test_an_id_that_is_no_token_is_refused(bad: str) -> None:
    with pytest.raises(RequestError) as caught:
        CHANNELS[0].subject("home", node=bad)
    assert caught.value.code == "invalid_request"
    assert caught.value.param == "node"
