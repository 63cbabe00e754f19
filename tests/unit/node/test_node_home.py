"""What a node keeps in its home folder: its identity and the last state."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import msgspec
import pytest

from skulk.errors import StartError
from skulk.ids import is_token
from skulk.node.identity import load_identity
from skulk.node.storage import StateFile, load_state
from tests.support.states import assignment, instance, state_of


def test_an_identity_is_made_once_and_each_start_is_a_new_incarnation(tmp_path: Path) -> None:
    first, second = load_identity(tmp_path), load_identity(tmp_path)
    assert first.node_id == second.node_id
    assert is_token(first.node_id)
    assert first.incarnation != second.incarnation
    (tmp_path / "other").mkdir()
    assert load_identity(tmp_path / "other").node_id != first.node_id


@pytest.mark.parametrize("body", [b"", b"{}", b'{"node_id": "has.a.dot"}', b'{"node_id": 7}', b"\xff"])
def test_a_damaged_identity_is_never_replaced_in_silence(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(body)
    with pytest.raises(StartError, match="no node identity") as refused:
        load_identity(tmp_path)
    assert refused.value.exit_status == 2
    assert (tmp_path / "identity.json").read_bytes() == body


async def test_the_newest_state_is_on_disk_after_a_flush(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    newest = state_of(instance(assigned=assignment()), seq=7)
    file.offer(state_of(seq=6))
    file.offer(newest)
    await file.flush()
    assert load_state(tmp_path, "test") == newest


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path, "test") is None


def test_a_damaged_state_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b'{"cluster": "te')
    assert load_state(tmp_path, "test") is None
    assert not path.exists()
    assert (tmp_path / "state.damaged.json").read_bytes() == b'{"cluster": "te'
    assert "set aside" in caplog.text


def test_another_clusters_state_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(msgspec.json.encode(state_of()))
    assert load_state(tmp_path, "other") is None
    assert path.exists()
    assert "belongs to the cluster 'test'" in caplog.text


async def test_a_full_disk_is_reported_and_the_next_write_heals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    file = StateFile(tmp_path)
    newest = state_of(seq=7)
    file.offer(newest)

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        patched.setattr(os, "fsync", full)
        await file.flush()
    assert "not on disk" in caplog.text
    await file.flush()
    assert load_state(tmp_path, "test") == newest
