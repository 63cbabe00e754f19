"""Who is let in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from skulk.errors import RequestError, StartError
from skulk.gateway.doors import Doors, read_keys

DOORS = Doors(("Box.Example.Org",), ("chat.example.org", "api.example.org:8443", "https://app.example.org/"), {})


def is_let_in(check: Callable[[], object], code: str) -> bool:
    refusal = None
    try:
        check()
    except RequestError as error:
        refusal = error.code
    assert refusal in (None, code)
    return refusal is None


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:52415", True),
        ("192.168.1.5", True),
        ("[::1]:52415", True),
        ("[fe80::1]", True),
        ("localhost:52415", True),
        ("mybox", True),
        ("mybox.local", True),
        ("mybox.LAN:1", True),
        ("a.home.arpa", True),
        ("a.internal.", True),
        ("box.example.org:52415", True),
        ("chat.example.org", True),
        ("chat.example.org:99", True),
        ("api.example.org:8443", True),
        ("api.example.org:8444", False),
        ("evil.example.org", False),
        ("127.0.0.1.evil.org", False),
        ("local.evil.org", False),
        ("evil-local", True),
        ("notlocal.evillocal", False),
        ("", False),
        (":80", False),
        ("[::1]evil.org", False),
        ("[::1]:80@evil.org", False),
        ("localhost:80@evil.org", False),
        ("localhost@evil.org", False),
        ("localhost:", False),
        ("localhost evil.org", False),
    ],
)
def test_hosts(host: str, is_ours: bool) -> None:
    assert is_let_in(lambda: DOORS.check_host(host), "forbidden_host") == is_ours


def test_no_host_at_all() -> None:
    assert not is_let_in(lambda: DOORS.check_host(None), "forbidden_host")


@pytest.mark.parametrize(
    ("origin", "host", "is_ours"),
    [
        (None, "mybox:52415", True),
        ("http://mybox:52415", "mybox:52415", True),
        ("http://MyBox:52415", "mybox:52415", True),
        ("https://mybox", "mybox:443", True),
        ("http://mybox", "mybox", True),
        ("http://mybox:52416", "mybox:52415", False),
        ("http://other:52415", "mybox:52415", False),
        ("null", "mybox", False),
        ("", "mybox", False),
        ("http://[", "mybox", False),
        ("http://mybox:99999", "mybox:99999", False),
        ("http://mybox:52415", None, False),
        ("https://chat.example.org", "mybox:52415", True),
        ("http://chat.example.org:8080", "mybox:52415", True),
        ("https://api.example.org:8443", "mybox", True),
        ("https://api.example.org", "mybox", False),
        ("https://app.example.org", "mybox", True),
        ("http://app.example.org", "mybox", False),
    ],
)
def test_origins(origin: str | None, host: str | None, is_ours: bool) -> None:
    assert is_let_in(lambda: DOORS.check_origin(origin, host), "forbidden_origin") == is_ours


def test_keys_from_entries_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nanna:k1\n\nben:k:2\n", encoding="utf-8")
    doors = Doors((), (), read_keys((f"@{file}", "carl:k3")))
    assert doors.check_key("/state", "Bearer k1", None) == "anna"
    assert doors.check_key("/state", "bearer k:2", None) == "ben"
    assert doors.check_key("/state", None, "k3") == "carl"
    assert doors.check_key("/health", None, None) is None
    for authorization, api_key in (
        (None, None),
        ("Bearer ", None),
        ("Bearer k9", None),
        ("Basic k1", None),
        ("k1", ""),
    ):
        assert not is_let_in(
            lambda sent=authorization, key=api_key: doors.check_key("/state", sent, key), "unauthorized"
        )


@pytest.mark.parametrize("entry", ["plain", ":key", "name:", "@/no/such/file", ""])
def test_entries_that_are_none(entry: str) -> None:
    with pytest.raises(StartError, match="SKULK_API_KEYS") as caught:
        read_keys((entry,))
    assert caught.value.code == "config_invalid"


def test_a_wrong_entry_never_shows_its_key() -> None:
    with pytest.raises(StartError) as caught:
        read_keys(("s3cret-without-name",))
    assert "s3cret" not in caught.value.detail
