"""What a person calls a model of the hub, taken apart. Pure.

org/repo                  the preferred quantization of the newest revision
org/repo:Q8_0             this quantization
org/repo@v1.2             this revision (a branch, a tag or a commit); also with a quantization, in any order
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from skulk.errors import RequestError

MAX_LENGTH: Final = 300
_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_FORM: Final = re.compile(
    rf"(?P<repo>{_PART}/{_PART})"
    r"(?::(?P<q1>[A-Za-z0-9_-]+))?(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/-]*))?(?::(?P<q2>[A-Za-z0-9_-]+))?"
)


class ModelReference(msgspec.Struct, frozen=True, kw_only=True):
    """A name taken apart; ``quantization`` and ``revision`` are empty where the name has none."""

    repo: str
    quantization: str = ""
    revision: str = ""

    @property
    def model_id(self) -> str:
        """The one spelling of the name."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f':{self.quantization}' if self.quantization else ''}"

    @property
    def folder(self) -> str:
        """Where its files lie under the models folder: one for each repository and revision that is asked for."""
        return f"{self.repo}@{self.revision.replace('/', '_')}" if self.revision else self.repo


def is_reference(name: str) -> bool:
    """Whether the hub could know a model of this name; a bare name is one of this machine's files."""
    found = _FORM.fullmatch(name) if len(name) <= MAX_LENGTH else None
    return (
        found is not None
        and not (found["q1"] and found["q2"])
        and ".." not in name
        and "--" not in found["repo"]
        and not found["repo"].endswith((".git", "."))
    )


def repo_of(model_id: str) -> str:
    """The repository of a model's id, ``org/repo:QUANT`` or ``org/repo@REVISION``; a bare name is its own."""
    return model_id.partition(":")[0].partition("@")[0]


def parse_reference(name: str) -> ModelReference:
    """Takes a name apart.

    Raises:
        RequestError: ``invalid_request``: it is none.
    """
    if not is_reference(name):
        raise RequestError(
            "invalid_request",
            f"{name[:MAX_LENGTH]!r} is no model of the hub; write org/repo, org/repo:QUANT or org/repo@REVISION.",
            param="model_id",
        )
    found = _FORM.fullmatch(name)
    assert found is not None
    return ModelReference(
        repo=found["repo"], quantization=found["q1"] or found["q2"] or "", revision=found["revision"] or ""
    )
