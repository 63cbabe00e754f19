"""Each kind of value: what is read, what is refused, and that what is shown reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk import settings_values as v
from skulk.settings import Settings
from skulk.settings_options import BY_FIELD, MASK, OPTIONS, masked_value, secrets_of, show_value
from skulk.units import GIB, KIB, MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24G", 24 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("64MiB", 64 * MIB),
        ("7k", 7 * KIB),
        ("2GB", 2 * 10**9),
        ("1073741824", GIB),
        ("12B", 12),
        ("0", 0),
        ("1TiB", 1024 * GIB),
    ],
)
def test_sizes(text: str, expected: int):
    assert v.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1,5GiB", "24 apples", "1e9", "0x10", "99999999TiB", "inf", "٣GiB"])
def test_what_is_no_size(text: str):
    with pytest.raises(ValueError):
        v.parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.5", "10.0.0.5:52416"),
        ("10.0.0.5:7000", "10.0.0.5:7000"),
        ("mac-studio.local", "mac-studio.local:52416"),
        ("/ip4/10.0.0.5/tcp/7000", "10.0.0.5:7000"),
        ("/ip4/10.0.0.5/tcp/7000/p2p/12D3KooW", "10.0.0.5:7000"),
        ("/dns4/box.lan/tcp/52416", "box.lan:52416"),
        ("[fe80::1]", "[fe80::1]:52416"),
        ("[fe80::1%eth0]:7000", "[fe80::1%eth0]:7000"),
        ("/ip6/fe80::1/tcp/7000", "[fe80::1]:7000"),
    ],
)
def test_peers(text: str, expected: str):
    assert v.parse_peer(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":52416", "host:", "host:0", "host:65536", "host:http", "/ip4/10.0.0.5", "/ip4/x/udp/1", "a b", "fe80::1:5"],
)
def test_what_is_no_peer(text: str):
    with pytest.raises(ValueError):
        v.parse_peer(text)


def test_folders_are_separated_by_commas_or_colons_and_a_list_is_taken_as_it_is():
    assert v.FOLDERS.parse("/a:/b,/c, /a") == ("/a", "/b", "/c")
    assert v.FOLDERS.parse(["/a:b", "/c,d"]) == ("/a:b", "/c,d")


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (v.PORT, "65536"),
        (v.PORT, "-1"),
        (v.PORT, "8080.0"),
        (v.SWITCH, "maybe"),
        (v.SWITCH, ["1"]),
        (v.SECONDS, "-1"),
        (v.SECONDS, "1e5"),
        (v.SECONDS, "604801"),
        (v.CLUSTER, "Home"),
        (v.CLUSTER, "a.b"),
        (v.CLUSTER, ""),
        (v.CLUSTER, "x" * 33),
        (v.HOST, "http://0.0.0.0"),
        (v.HOST, ""),
        (v.HTTP_URL, "127.0.0.1:52415"),
        (v.HTTP_URL, "nats://127.0.0.1"),
        (v.NATS_URLS, "http://127.0.0.1"),
        (v.NATS_URLS, "nats://a,b"),
        (v.GPU_LAYERS, "most"),
        (v.TEXT, "two\nlines"),
        (v.FOLDER, "a\0b"),
        (v.integer(1, 256), "0"),
        (v.choice("a", "b"), "c"),
        (v.words("", among=("cpu",)), "cpu,tpu"),
    ],
)
def test_refused(parser: v.Parser, text: v.Raw):
    with pytest.raises(ValueError):
        parser.parse(text)


VALUES: dict[str, st.SearchStrategy[object]] = {
    "memory_limit_bytes": st.integers(0, 2**60 - 1),
    "max_body_bytes": st.integers(0, 2**60 - 1),
    "load_wait_s": st.integers(0, 604_800_000).map(lambda milliseconds: milliseconds / 1000),
    "gpu_layers": st.integers(-1, 10_000),
    "mdns": st.booleans(),
    "local": st.booleans(),
    "api_port": st.integers(0, 65535),
    "bootstrap_peers": st.lists(st.sampled_from(["a:1", "b.lan:52416", "[::1]:7"]), unique=True).map(tuple),
    "backends": st.lists(st.sampled_from(v.COMPUTES), unique=True).map(tuple),
    "participation": st.sampled_from(["full", "management"]),
    "nats_url": st.sampled_from(["nats://a:4222", "tls://u:p@b:1,nats://c"]),
}


@given(st.data())
def test_what_is_shown_reads_back(data: st.DataObject):
    field = data.draw(st.sampled_from(sorted(VALUES)))
    option, value = BY_FIELD[field], data.draw(VALUES[field])
    assert option.parser.parse(show_value(option, value)) == value


def test_every_default_reads_back():
    defaults = Settings(home="/h", models_dir="/h/models")
    for option in OPTIONS:
        value = getattr(defaults, option.field)
        shown = show_value(option, value)
        if shown:
            assert option.parser.parse(shown) == value, option.env


def test_the_table_covers_every_field_once_and_every_name_once():
    assert sorted(option.field for option in OPTIONS) == sorted(Settings.__struct_fields__)
    assert len({option.env for option in OPTIONS}) == len(OPTIONS)
    assert len({option.key for option in OPTIONS}) == len(OPTIONS)
    flags = [option.flag for option in OPTIONS if option.flag]
    assert len(set(flags)) == len(flags)


def test_secrets_are_masked_and_so_are_passwords_in_addresses():
    assert masked_value(BY_FIELD["cluster_token"], "hush-hush") == MASK
    assert masked_value(BY_FIELD["api_keys"], ("sk-1", "sk-2")) == MASK
    assert masked_value(BY_FIELD["hf_token"], "") == ""
    assert masked_value(BY_FIELD["nats_url"], "nats://me:p@ss@host:4222") == f"nats://{MASK}@host:4222"
    assert masked_value(BY_FIELD["api_port"], 8080) == "8080"


def test_the_secrets_of_settings_are_known_to_the_log():
    settings = Settings(
        home="",
        models_dir="",
        cluster_token="hush",
        api_keys=("ann:sk-1", "@keys"),
        hf_token="hf_1",
        nats_url="nats://me:pass@a,tls://b",
    )
    assert set(secrets_of(settings)) == {"hush", "ann:sk-1", "sk-1", "@keys", "hf_1", "pass"}
    assert secrets_of(Settings(home="", models_dir="")) == ()
