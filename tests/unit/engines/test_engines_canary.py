"""The canary's judgement: tables of what was recited and what is on record."""

from __future__ import annotations

from pathlib import Path

import pytest

from skulk.engines.canary import NEAR_TIE, REMEMBERED, TOKENS, CanaryRecord, Recital, fault_of, with_recital
from skulk.engines.llama_cpp.threads import waited_s

SURE = (4.0,) * TOKENS
TEXT = tuple(range(100, 100 + TOKENS))
RECORD = CanaryRecord(tokens=TEXT, margins=SURE, speeds=(10.0, 100.0, 100.0, 100.0, 1000.0))


def recital(tokens: tuple[int, ...] = TEXT, *, step_s: float = 0.01, waited: float = 0.0) -> Recital:
    return Recital(tokens=tokens, margins=SURE[: len(tokens)], step_s=step_s, waited_s=waited)


def other(at: int) -> tuple[int, ...]:
    """The text with another token at a place, and others after it."""
    return (*TEXT[:at], *(token + 1000 for token in TEXT[at:]))


@pytest.mark.parametrize(
    ("told", "record", "words"),
    [
        (recital(), None, ""),
        (recital(), RECORD, ""),
        (recital((7,) * TOKENS), None, "one token (7) 16 times over"),
        (recital((7,) * (TOKENS - 1)), None, ""),
        (recital((7,) * (TOKENS - 1) + (8,)), None, ""),
        (recital(other(3)), RECORD, "they part at token 4 of 16, where the scores were 4.00 apart"),
        (recital(TEXT[:5]), RECORD, "they part at token 6 of 16"),
        (recital(step_s=1 / 31), RECORD, ""),
        (recital(step_s=1 / 29), RECORD, "computes 29.00 tokens a second, less than 0.3 of the 100.00 that its last 5"),
        (recital(step_s=1 / 29, waited=0.01), RECORD, ""),  # others had the processors
        (recital(step_s=1.0, waited=0.5), RECORD, "1.00 tokens a second"),
        (recital(step_s=0.0), RECORD, ""),  # ended at once: no speed
        (recital(step_s=9.0), CanaryRecord(tokens=TEXT, margins=SURE), ""),
        (Recital(tokens=(), margins=()), CanaryRecord(tokens=(), margins=()), ""),
    ],
)
def test_verdicts(told: Recital, record: CanaryRecord | None, words: str) -> None:
    fault = fault_of(told, record)
    assert (words in fault) if words else fault == ""


@pytest.mark.parametrize(("margin", "is_faulty"), [(NEAR_TIE, False), (NEAR_TIE + 0.01, True)])
def test_texts_may_part_at_a_near_tie(margin: float, is_faulty: bool) -> None:
    margins = (*SURE[:5], margin, *SURE[6:])
    one_other = (*TEXT[:5], 7, *TEXT[6:])
    assert bool(fault_of(recital(one_other), CanaryRecord(tokens=TEXT, margins=margins))) == is_faulty


def test_behind_a_near_tie_the_comparison_goes_on() -> None:
    margins = (0.1, *SURE[1:])
    fault = fault_of(recital((7, *TEXT[1:9], 8, *TEXT[10:])), CanaryRecord(tokens=TEXT, margins=margins))
    assert "they part at token 10 of 16" in fault


def test_an_end_that_is_not_drawn_any_more_is_another_text() -> None:
    short = CanaryRecord(tokens=TEXT[:3], margins=(4.0, 4.0, 4.0, 4.0))
    assert "token 4" in fault_of(recital(), short)
    assert fault_of(recital(), CanaryRecord(tokens=TEXT[:3], margins=(4.0, 4.0, 4.0, 0.1))) == ""


def test_the_first_text_and_the_last_five_speeds_are_remembered() -> None:
    record: CanaryRecord | None = None
    for count in range(1, 9):
        record = with_recital(record, recital(other(count), step_s=1 / count))
    assert record is not None
    assert record.tokens == other(1)
    assert record.speeds == pytest.approx(range(4, 9))
    assert len(record.speeds) == REMEMBERED
    assert with_recital(record, recital(step_s=0.0)) == record


def test_waiting_for_processors_is_read_from_the_kernel(tmp_path: Path) -> None:
    for task, waited in (("1", 1_500_000_000), ("2", 500_000_000)):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(f"123456 {waited} 7\n")
    assert waited_s(tmp_path) == 2.0
    (tmp_path / "3").mkdir()
    assert waited_s(tmp_path) == 0.0
    assert waited_s(tmp_path / "none") == 0.0
