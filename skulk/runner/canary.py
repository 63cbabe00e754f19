"""Has a loaded engine recite, holds it against what is on record for this file and build, and takes it down.

<canary_dir>/<16 hex digits>.json    one `CanaryRecord` for a file, a build, a backend and the settings that change
                                     what it computes or how fast
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final

import msgspec

from skulk.engines.canary import PROMPT, TOKENS, CanaryRecord, fault_of, with_recital
from skulk.engines.protocol import Engine
from skulk.errors import ServiceError, SkulkError
from skulk.files import write_atomic
from skulk.wire.runner import RunnerSpec

log = logging.getLogger(__name__)

MAX_RECORDS: Final = 500


class RecordFile(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it lies on the disk, with what it is of, for people and for `skulk doctor --forgive`."""

    backend: str
    model_id: str
    version: str
    record: CanaryRecord


def listen_to(engine: Engine, spec: RunnerSpec) -> float:
    """Returns where the engine is fit to serve. Blocks for some steps; engine thread.

    Returns:
        tokens that it drew a second for one sequence; 0.0: not measured.

    Raises:
        ServiceError: ``backend_faulty``: it isn't, with the reason; ``runner_failed``: it can't compute.
    """
    if engine.info.pooling:
        return 0.0  # it draws no tokens, so it has no text to recite
    path = record_path(engine, spec)
    record = None if path is None else _read(path)
    recital = engine.recite(PROMPT, TOKENS, () if record is None else record.tokens)
    fault = fault_of(recital, record)
    if fault:
        raise ServiceError(
            "backend_faulty",
            f"{spec.load.backend} failed the test after loading {spec.model_id}: {fault}. The node stops offering it; "
            "'skulk doctor' tells how to go on.",
        )
    if path is not None:
        after = with_recital(record, recital)
        _write(
            path,
            RecordFile(backend=spec.load.backend, model_id=spec.model_id, version=engine.info.version, record=after),
        )
    return 1.0 / recital.step_s if recital.step_s else 0.0


def record_path(engine: Engine, spec: RunnerSpec) -> Path | None:
    """Where this load's record lies; None: it isn't known what was loaded, or nothing is kept."""
    if not spec.canary_dir or not spec.weights:
        return None
    load = spec.load
    facts = (
        spec.weights,
        engine.info.build,
        load.backend,
        load.kv_type,
        load.flash_attention,
        load.gpu_layers,
        load.n_threads,
    )
    return Path(spec.canary_dir) / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> CanaryRecord | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=RecordFile).record
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s can't be read (%s): this load is its first", path, error)
        return None


def _write(path: Path, record: RecordFile) -> None:
    """A load is not refused for a record that can't be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(record), fsync=False)
        records = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in records[:-MAX_RECORDS]:
            old.unlink()
    except (OSError, SkulkError) as error:
        log.warning("what the engine recited can't be kept in %s: %s", path.parent, error)
