"""What nodes say by mDNS, and what is held against them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.discovery.adverts import Advert, fitting, proof_key, read_advert, refusal_of, txt_of, with_proof

OURS = Advert(
    cluster="home",
    node_id="aaaa",
    version="0.1.0",
    protocol=1,
    port=52416,
    addresses=("10.0.0.2", "fd00::2"),
    name="attic",
)
KEY, OTHER_KEY = proof_key("hush", "home"), proof_key("other", "home")


def test_it_reads_what_it_writes() -> None:
    signed = with_proof(OURS, KEY)
    assert read_advert(txt_of(signed)) == signed
    assert read_advert(txt_of(OURS)) == OURS
    assert OURS.routes == ("10.0.0.2:52416", "[fd00::2]:52416")


def test_the_token_is_not_in_it_and_the_key_is_the_cluster_s_own() -> None:
    assert "hush" not in str(txt_of(with_proof(OURS, KEY)))
    assert len({KEY, OTHER_KEY, proof_key("hush", "garage"), proof_key("", "home")}) == 4
    assert proof_key("", "home") == b""


@pytest.mark.parametrize(
    ("change", "ours", "problem", "words"),
    [
        ({}, b"", None, ""),
        ({"cluster": "garage"}, b"", "other_cluster", "the cluster garage, this node to home"),
        ({"protocol": 2, "version": "9.0"}, b"", "incompatible_version", "Skulk 9.0, which speaks version 2"),
        ({"addresses": ("169.254.1.1",)}, b"", "no_usable_address", "no address"),
        ({}, KEY, "wrong_token", "this node has a SKULK_CLUSTER_TOKEN and it has none"),
    ],
)
def test_what_is_held_against_an_advert(
    change: dict[str, object], ours: bytes, problem: str | None, words: str
) -> None:
    advert = msgspec.structs.replace(OURS, **change)
    found = refusal_of(advert, cluster="home", protocol=1, key=ours)
    assert (None if found is None else found.problem) == problem
    assert found is None or words in found.detail


def test_only_who_knows_the_token_is_joined() -> None:
    def refused(advert: Advert, key: bytes) -> str | None:
        found = refusal_of(advert, cluster="home", protocol=1, key=key)
        return None if found is None else found.problem

    signed = with_proof(OURS, KEY)
    assert refused(signed, KEY) is None
    assert refused(signed, OTHER_KEY) == refused(signed, b"") == "wrong_token"
    # A copy of somebody's proof that leads elsewhere.
    for stolen in ({"addresses": ("10.6.6.6",)}, {"port": 666}, {"node_id": "bbbb"}):
        assert refused(msgspec.structs.replace(signed, **stolen), KEY) == "wrong_token"


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["cluster", "node", "route", "protocol", "at", "proof", "version"]), st.text()))
def test_no_words_of_a_stranger_break_the_reader(txt: dict[str, str]) -> None:
    advert = read_advert({**txt_of(OURS), **txt})
    if advert is not None:
        assert 0 < advert.port < 65536
        assert all(":" in route for route in advert.routes)
        refusal_of(advert, cluster="home", protocol=1, key=KEY)


def test_addresses_that_do_not_fit_are_left_out_before_it_is_signed() -> None:
    many = msgspec.structs.replace(
        OURS, addresses=tuple(f"2001:4860:4860:1111:2222:3333:4444:{n:x}" for n in range(4096, 4106))
    )
    signed = with_proof(fitting(many), KEY)
    assert 1 < len(signed.addresses) < 10
    read = read_advert(txt_of(signed))
    assert read is not None and refusal_of(read, cluster="home", protocol=1, key=KEY) is None
    assert all(len(f"{key}={value}") <= 255 for key, value in txt_of(signed).items())
