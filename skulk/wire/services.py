"""Answers to ``$SRV.PING``, ``$SRV.INFO`` and ``$SRV.STATS``: the service protocol of NATS (its ADR-32)."""

from __future__ import annotations

from typing import Any

from skulk.wire.base import Wire


class ServicePing(Wire, frozen=True, kw_only=True):
    """Answer to ``$SRV.PING``."""

    type: str = "io.nats.micro.v1.ping_response"
    name: str
    id: str
    version: str
    metadata: dict[str, str] = {}


class EndpointInfo(Wire, frozen=True, kw_only=True):
    """One endpoint in `ServiceInfo`."""

    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str] = {}


class ServiceInfo(Wire, frozen=True, kw_only=True):
    """Answer to ``$SRV.INFO``."""

    type: str = "io.nats.micro.v1.info_response"
    name: str
    id: str
    version: str
    description: str
    metadata: dict[str, str] = {}
    endpoints: tuple[EndpointInfo, ...] = ()


class EndpointStats(Wire, frozen=True, kw_only=True):
    """One endpoint in `ServiceStats`; times in nanoseconds."""

    name: str
    subject: str
    queue_group: str
    num_requests: int
    num_errors: int
    last_error: str
    processing_time: int
    average_processing_time: int
    data: dict[str, Any] = {}


class ServiceStats(Wire, frozen=True, kw_only=True):
    """Answer to ``$SRV.STATS``. ``started``: ISO 8601, UTC."""

    type: str = "io.nats.micro.v1.stats_response"
    name: str
    id: str
    version: str
    metadata: dict[str, str] = {}
    started: str
    endpoints: tuple[EndpointStats, ...] = ()
