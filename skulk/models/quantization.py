"""Which quantization a file is, by its name and its header, and which one to prefer. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

# A token of its own between separators: `Q4_K_M`, `UD-Q4_K_XL`, `IQ4_XS`, `BF16`, `MXFP4_MOE`. Never a substring.
_TOKEN: Final = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q[1-8]_(?:K(?:_(?:XXL|XL|L|M|S|XS))?|NL|XXS|XS|S|M|[01])|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4"
    r"|BF16|FP?16|FP?32))(?=$|[-._])",
    re.IGNORECASE,
)
_PART: Final = re.compile(r"-([0-9]{5})-of-([0-9]{5})$")
_ALIASES: Final = {"FP16": "F16", "FP32": "F32", "MXFP4_MOE": "MXFP4"}

# The best of size and quality first; a name that isn't listed stands by its family below.
_ORDER: Final = (
    "Q4_K_M", "Q4_K_L", "Q4_K_XL", "Q4_K_S", "Q5_K_M", "Q5_K_L", "Q5_K_XL", "Q5_K_S", "Q6_K", "Q6_K_L", "Q6_K_XL",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_K_XL",
    "Q3_K_M", "Q3_K_L", "Q3_K_XL", "Q3_K_S", "Q2_K", "Q2_K_L", "Q2_K_XL", "Q2_K_S",
)  # fmt: skip
_IQ: Final = (
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_M",
    "IQ3_S",
    "IQ3_XS",
    "IQ3_XXS",
    "IQ2_M",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
)
_RANKS: Final = {name: rank for rank, name in enumerate((*_ORDER, *_IQ, "MXFP4", "NVFP4"))}
_RANK_UNKNOWN: Final = len(_RANKS)
_RANK_FULL: Final = {"BF16": _RANK_UNKNOWN + 1, "F16": _RANK_UNKNOWN + 2, "F32": _RANK_UNKNOWN + 3}


class FileName(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a GGUF file's name.

    Attributes:
        base: the name without quantization, part numbers and ending.
        quantization: in upper case; empty where the name has none.
        part: 1 for a file that is whole.
    """

    base: str
    quantization: str = ""
    part: int = 1
    parts: int = 1

    @property
    def is_projector(self) -> bool:
        """Whether it is the vision part of another model: no model by itself."""
        return re.search(r"(^|[-._])mmproj([-._]|$)", self.base, re.IGNORECASE) is not None


def parse_file_name(name: str) -> FileName:
    """Takes a file's name apart; ``name`` without folders, with or without ``.gguf``."""
    stem = whole_stem(name)
    part = parts = 1
    if found := _PART.search(name.lower().removesuffix(".gguf")):
        part, parts = int(found.group(1)), int(found.group(2))
    # The last token is the file's; a model's own name may hold one before it.
    tokens = list(_TOKEN.finditer(stem))
    if not tokens:
        return FileName(base=stem, part=part, parts=parts)
    token = tokens[-1]
    base = (stem[: token.start()] + stem[token.end() :]).strip("-._")
    return FileName(base=base, quantization=normal(token.group(1)), part=part, parts=parts)


def whole_stem(name: str) -> str:
    """A file's name without its ending and its part numbers."""
    stem = name[:-5] if name.lower().endswith(".gguf") else name
    return _PART.sub("", stem)


def normal(quantization: str) -> str:
    """The one spelling of a quantization's name."""
    upper = quantization.upper().removeprefix("UD-")
    return _ALIASES.get(upper, upper)


def rank(quantization: str) -> int:
    """Where a quantization stands in the order of preference; lower is better."""
    name = normal(quantization)
    return _RANK_FULL.get(name, _RANKS.get(name, _RANK_UNKNOWN))


def preferred(quantizations: Iterable[str]) -> str:
    """The best of several; ties by name."""
    return min(quantizations, key=lambda name: (rank(name), name))
