"""Bodies beyond 512 KiB travel as parcels: the message says where the body waits, the receiver fetches it in parts.

    sender                                      receiver
    keeps the body, sends {owner, id, size, sha256} with the header Skulk-Parcel
                                    <── transfer.part {id, offset, length}   four at a time
    the bytes, raw ──>
                                                checks size and sha256, then goes on as if it had come in one piece
    forgets it: a request's at the answer, an answer's when all of it was fetched or 30 s after the last part

Memory is bounded on both sides: what is kept, and what is being fetched, by ``limit_bytes`` each.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from skulk.bus.port import Bus, Call, Service
from skulk.bus.subjects import TRANSFER_PART
from skulk.bus.transport import PARCEL, Raw
from skulk.clock import Clock
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.units import KIB, MIB, format_bytes
from skulk.wire.base import decode, encode
from skulk.wire.transfer import Parcel, PartRequest

PARCEL_OVER_BYTES: Final = 512 * KIB
PARCELS_LIMIT_BYTES: Final = 256 * MIB
PARTS_IN_FLIGHT: Final = 4
PART_TIMEOUT_S: Final = 5.0
PART_TRIES: Final = 3
FETCH_TIMEOUT_S: Final = 60.0
KEPT_S: Final = 30.0

_HEADROOM: Final = 4 * KIB
_HASH_IN_THREAD_OVER: Final = 4 * MIB


class _Kept(msgspec.Struct):
    body: bytes
    once: bool
    fetched: dict[int, int]
    expiry: asyncio.TimerHandle | None = None


class Packed(msgspec.Struct, frozen=True):
    """A body as it goes into a message. ``parcel_id``: what to `Parcels.release`, where it became a parcel."""

    body: bytes
    headers: dict[str, str]
    parcel_id: str | None = None


async def sha256_of(body: bytes | bytearray) -> str:
    """The digest, hexadecimal; large bodies are hashed beside the event loop."""
    if len(body) <= _HASH_IN_THREAD_OVER:
        return hashlib.sha256(body).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())


class Parcels:
    """One bus's parcels: those it keeps for others to fetch, and those it fetches.

    Args:
        bus: asks for parts and serves them; the service ``transfer`` starts with the first parcel.
        owner: this bus's token in the subjects of parts.
        new_id: names parcels.
        limit_bytes: the most that is kept, and the most that is being fetched.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        owner: str,
        clock: Clock,
        new_id: Callable[[], str],
        limit_bytes: int = PARCELS_LIMIT_BYTES,
    ) -> None:
        self._bus = bus
        self._owner = owner
        self._clock = clock
        self._new_id = new_id
        self._limit = limit_bytes
        self._kept: dict[str, _Kept] = {}
        self._kept_bytes = 0
        self._fetching_bytes = 0
        self._serving: asyncio.Task[Service] | None = None

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    @property
    def inline_limit(self) -> int:
        """The largest body that travels in its message, bytes; parts are as large."""
        return min(PARCEL_OVER_BYTES, self._bus.max_payload - _HEADROOM)

    async def pack(self, body: bytes, *, once: bool) -> Packed:
        """Keeps a large body and returns the message that names it; a small one goes as it is.

        Args:
            body: of the message, however large.
            once: one receiver fetches it, so it is dropped when all of it went out; else it stays until `release`.

        Raises:
            RequestError: ``message_too_large``: over the limit even of parcels.
            UnavailableError: ``overloaded``: other parcels take the room.
        """
        if len(body) <= self.inline_limit:
            return Packed(body, {})
        self._make_room(len(body))
        parcel_id = self._new_id()
        kept = self._kept[parcel_id] = _Kept(body, once, {})
        self._kept_bytes += len(body)
        try:
            await self._serve()
            digest = await sha256_of(body)
        except BaseException:
            self.release(parcel_id)
            raise
        if once:
            self._expire_later(parcel_id, kept)
        parcel = Parcel(owner=self._owner, parcel_id=parcel_id, size_bytes=len(body), sha256=digest)
        return Packed(encode(parcel), {PARCEL: "1"}, parcel_id)

    def release(self, parcel_id: str | None) -> None:
        """Forgets a parcel; unknown ones are no error."""
        kept = self._kept.pop(parcel_id, None) if parcel_id is not None else None
        if kept is None:
            return
        self._kept_bytes -= len(kept.body)
        if kept.expiry is not None:
            kept.expiry.cancel()

    async def unpack(self, message: Raw, *, deadline: float | None) -> bytes:
        """The body of a message, fetched if it is a parcel.

        Args:
            message: as it came in.
            deadline: `Clock.now()` seconds until which it may take; None: 60 s from now.

        Raises:
            RequestError: ``message_too_large``.
            UnavailableError: ``overloaded``: other fetches take the room; or what the owner answered.
            ServiceError: ``deadline_exceeded``, ``invalid_message`` (another size or hash than was said).
        """
        if PARCEL not in message.headers:
            return message.body
        parcel = decode(message.body, Parcel)
        self._check_limit(parcel.size_bytes)
        if self._fetching_bytes + parcel.size_bytes > self._limit:
            raise UnavailableError("overloaded", "other large messages are being fetched: try again in a second")
        self._fetching_bytes += parcel.size_bytes
        try:
            body = await self._fetch(parcel, self._clock.now() + FETCH_TIMEOUT_S if deadline is None else deadline)
        finally:
            self._fetching_bytes -= parcel.size_bytes
        if await sha256_of(body) != parcel.sha256:
            raise ServiceError("invalid_message", f"parcel {parcel.parcel_id} came with another sha256 than was said")
        return bytes(body)

    async def close(self) -> None:
        """Forgets everything that is kept."""
        for parcel_id in tuple(self._kept):
            self.release(parcel_id)
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})

    def _check_limit(self, size: int) -> None:
        if size < 0:
            raise ServiceError("invalid_message", f"a parcel of {size} bytes can't be")
        if size > self._limit:
            raise RequestError(
                "message_too_large",
                f"a message of {size} bytes is over the limit of {self._limit} bytes ({format_bytes(self._limit)})",
            )

    def _make_room(self, size: int) -> None:
        self._check_limit(size)
        if self._kept_bytes + size > self._limit:
            raise UnavailableError(
                "overloaded",
                f"{format_bytes(self._kept_bytes)} of large messages wait to be fetched: try again in a second",
            )

    def _expire_later(self, parcel_id: str, kept: _Kept) -> None:
        if kept.expiry is not None:
            kept.expiry.cancel()
        kept.expiry = asyncio.get_running_loop().call_later(KEPT_S, self.release, parcel_id)

    async def _serve(self) -> None:
        if self._serving is None:
            handlers = {TRANSFER_PART: self._part}
            serving = self._bus.serve("transfer", handlers, owner=self._owner)
            self._serving = asyncio.create_task(serving, name="serve transfer")
        await asyncio.shield(self._serving)

    async def _part(self, call: Call[PartRequest]) -> bytes:
        want = call.message
        kept = self._kept.get(want.parcel_id)
        if kept is None:
            raise RequestError("invalid_request", f"parcel {want.parcel_id} is not kept here (any more): ask again")
        end = want.offset + want.length
        if not (0 <= want.offset < end <= len(kept.body) and want.length <= self.inline_limit):
            raise RequestError("invalid_request", f"bytes {want.offset} to {end} are no part of this parcel")
        if kept.once:
            kept.fetched[want.offset] = want.length
            if sum(kept.fetched.values()) >= len(kept.body):
                self.release(want.parcel_id)
            else:
                self._expire_later(want.parcel_id, kept)
        return kept.body[want.offset : end]

    async def _fetch(self, parcel: Parcel, deadline: float) -> bytearray:
        target = bytearray(parcel.size_bytes)
        offsets = iter(range(0, parcel.size_bytes, self.inline_limit))
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(PARTS_IN_FLIGHT):
                    fetching = self._fetch_parts(parcel, offsets, target, deadline)
                    group.create_task(fetching, name=f"fetch {parcel.parcel_id} {number}")
        except BaseExceptionGroup as failed:
            for error in failed.exceptions:
                if isinstance(error, SkulkError):
                    raise error from None
            raise
        return target

    async def _fetch_parts(self, parcel: Parcel, offsets: Iterator[int], target: bytearray, deadline: float) -> None:
        for offset in offsets:
            length = min(self.inline_limit, parcel.size_bytes - offset)
            part = await self._fetch_part(parcel, offset, length, deadline)
            if len(part) != length:
                raise ServiceError("invalid_message", f"a part of {length} bytes came with {len(part)}")
            target[offset : offset + length] = part

    async def _fetch_part(self, parcel: Parcel, offset: int, length: int, deadline: float) -> bytes:
        ask = PartRequest(parcel_id=parcel.parcel_id, offset=offset, length=length)
        for tries_left in reversed(range(PART_TRIES)):
            timeout_s = min(PART_TIMEOUT_S, deadline - self._clock.now())
            try:
                return await self._bus.request(TRANSFER_PART, ask, timeout_s=timeout_s, owner=parcel.owner)
            except SkulkError as error:
                if not error.retryable or not tries_left or self._clock.now() >= deadline:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")
