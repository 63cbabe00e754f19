"""errors.toml equals the codes of skulk/errors.py, and the codes are well formed."""

from __future__ import annotations

import msgspec
import pytest

from skulk.errors import ERRORS, ErrorCode, ServiceError, SkulkError, error_of
from skulk.wire.base import ErrorBody, decode, encode
from tests.support.contract import toml

CONTRACT = toml("errors.toml")


def test_the_same_codes_stand_in_both_in_the_same_order() -> None:
    assert list(CONTRACT) == list(ERRORS)


@pytest.mark.parametrize("code", CONTRACT)
def test_a_code_is_the_same_in_both_and_explained(code: str) -> None:
    entry = dict(CONTRACT[code])
    meaning = entry.pop("meaning")
    assert msgspec.convert(entry, ErrorCode) == ERRORS[code]
    assert meaning.endswith(".")


def test_numbers_are_never_shared() -> None:
    assert len({entry.number for entry in ERRORS.values()}) == len(ERRORS)


@pytest.mark.parametrize(("code", "entry"), ERRORS.items())
def test_families_statuses_and_numbers_agree(code: str, entry: ErrorCode) -> None:
    statuses = {
        "request": {400, 401, 403, 404, 405, 413, 415},
        "unavailable": {429, 503},
        "service": {500, 502, 504},
        "start": {500},
    }
    assert entry.http_status in statuses[entry.family], code
    assert entry.exit_status in (1, 2, 75)
    assert 40000 <= entry.number <= 69999
    assert entry.retryable or entry.family != "unavailable"
    assert not (entry.retryable and entry.family in ("request", "start"))


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_crosses_the_bus_whole(code: str) -> None:
    error = error_of(code, "why, and what to do", param="model", retry_after_s=1.5)
    again = decode(encode(ErrorBody.of(error)), ErrorBody).to_error()
    assert type(again) is type(error)
    assert isinstance(again, SkulkError)
    assert (again.code, again.detail, again.param, again.retry_after_s) == (code, error.detail, "model", 1.5)


def test_a_newer_peer_s_code_becomes_internal_and_keeps_its_name() -> None:
    error = error_of("code_of_tomorrow", "something new")
    assert isinstance(error, ServiceError)
    assert error.code == "internal"
    assert "code_of_tomorrow" in error.detail
