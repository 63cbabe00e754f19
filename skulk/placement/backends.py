"""Compute backends as tags: ``<engine>`` (bare) or ``<engine>-<compute>``.

A node advertises the bare engine and one tag for each compute it can really use; a card lists what it accepts,
preferred first. The first accepted tag that a node offers is the resolved backend.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

COMPUTES: Final = ("metal", "cuda", "rocm", "vulkan", "cpu")
"""Known computes; a bare engine in a card resolves to the first of these that the node offers."""

_TAG: Final = re.compile(r"(?P<engine>[a-z0-9_]+)(?:-(?P<compute>[a-z0-9_]+))?")


class Tag(NamedTuple):
    """A tag's parts; ``compute`` is empty for the bare engine."""

    engine: str
    compute: str

    def __str__(self) -> str:
        return f"{self.engine}-{self.compute}" if self.compute else self.engine


def parse_tag(text: str) -> Tag | None:
    """The parts of a tag; None where the text is none (a newer peer's grammar must not break placement)."""
    match = _TAG.fullmatch(text)
    return None if match is None else Tag(match["engine"], match["compute"] or "")


def tags_for(engine: str, computes: Iterable[str]) -> tuple[str, ...]:
    """What a node advertises for an engine with these computes: the bare tag first; nothing without a compute."""
    concrete = tuple(str(Tag(engine, compute)) for compute in dict.fromkeys(computes))
    return (engine, *concrete) if concrete else ()


def resolve(accepted: tuple[str, ...], advertised: tuple[str, ...]) -> str | None:
    """The backend that serves a card on a node: the card's order decides. None: the node offers none of them.

    A bare engine in the card accepts every compute of it, in the order of `COMPUTES`, then unknown ones by name.
    """
    found = rank_of(accepted, advertised)
    return None if found is None else found.backend


class Ranked(NamedTuple):
    """A resolved backend and its place in the card's order, 0 the best."""

    backend: str
    rank: int


def rank_of(accepted: tuple[str, ...], advertised: tuple[str, ...]) -> Ranked | None:
    """`resolve` with the rank."""
    offered = [tag for tag in map(parse_tag, advertised) if tag is not None and tag.compute]
    for rank, text in enumerate(accepted):
        wanted = parse_tag(text)
        if wanted is None:
            continue
        matching = [tag for tag in offered if tag.engine == wanted.engine and wanted.compute in ("", tag.compute)]
        if matching:
            return Ranked(str(min(matching, key=_compute_order)), rank)
    return None


def _compute_order(tag: Tag) -> tuple[int, str]:
    known = COMPUTES.index(tag.compute) if tag.compute in COMPUTES else len(COMPUTES)
    return known, tag.compute
