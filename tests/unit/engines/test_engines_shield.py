"""People's text never becomes special tokens: the text work, without a model."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.shield import NONCE_DIGITS, Segment, Shield, SpecialTexts
from skulk.errors import RequestError

SPECIALS = ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]")
NONCE = "3141592653589793238462643383279502884197"


def shield() -> Shield:
    return Shield(SpecialTexts(SPECIALS), NONCE)


def trusted(segments: tuple[Segment, ...]) -> str:
    return "\0".join(segment.text for segment in segments if segment.is_trusted)


def whole(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "before <|im_end|> after",
        "ends with <",
        "ends with <|im_en",
        "end|> starts like an end",
        ">",
        "spaces hide it < \n",
        "<|IM_END|>",
        "see </S>",
        "[INST",
    ],
)
def test_dangerous_texts_are_hidden_whole(text: str) -> None:
    one = shield()
    hidden = one.hide(text)
    assert re.fullmatch(rf"\s*{NONCE}\d{{7}}\s*", hidden)
    segments = one.segments(f"<|im_start|>{hidden}<|im_end|>")
    assert whole(segments) == f"<|im_start|>{text}<|im_end|>"
    assert "".join(trusted(segments).replace("\0", "").split()) == "<|im_start|><|im_end|>"


@pytest.mark.parametrize("text", ["", "plain", "a < b", "im_end", "x|y", "1 << 2 is", "Grüße 東京 🦊", "[IN]"])
def test_harmless_texts_stay_as_they_are(text: str) -> None:
    assert shield().hide(text) == text


def test_white_space_around_a_hidden_text_stays_outside() -> None:
    one = shield()
    hidden = one.hide(" \n <s> x\t")
    assert hidden.startswith(" \n 3") and hidden.endswith("\t")
    assert whole(one.segments(hidden.strip())) == "<s> x"


def test_a_name_inside_a_special_token_is_hidden() -> None:
    assert shield().hide("im_end", is_name=True) != "im_end"
    assert shield().hide("weather", is_name=True) == "weather"


def test_values_are_hidden_at_every_depth() -> None:
    one = shield()
    value = {"a": ["<s>", {"<s>": 1}], "n": 3, "t": True, "z": None, "s": "fine"}
    hidden = one.hide_all(value)
    assert "<s>" not in json.dumps(hidden)
    assert (hidden["n"], hidden["t"], hidden["z"], hidden["s"]) == (3, True, None, "fine")
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        one.hide_all(deep)


def test_a_text_written_as_json_comes_back_escaped() -> None:
    one = shield()
    text = 'say "<s>" \\ and\nGrüße'
    hidden = one.hide(text)
    for depth in range(3):
        expected = text
        for _ in range(depth):
            expected = json.dumps(expected, ensure_ascii=False)[1:-1]
        assert whole(one.segments(f"{hidden[:-1]}{depth}")) == expected


def test_a_stand_in_that_was_cut_is_an_error() -> None:
    one = shield()
    hidden = one.hide("<s>")
    for cut in (hidden[:-1], hidden[:30], hidden[:20] + " " + hidden[20:]):
        with pytest.raises(RequestError, match="cuts texts apart") as caught:
            one.segments(f"a {cut} b")
        assert caught.value.code == "template_failed"


def test_reveal_puts_texts_back_for_people() -> None:
    one = shield()
    assert one.reveal(f"refused: {one.hide('<s> hi')}!") == "refused: <s> hi!"


def test_a_vocabulary_without_special_tokens_hides_nothing() -> None:
    one = Shield(SpecialTexts(()), NONCE)
    assert one.hide("<|im_end|>") == "<|im_end|>"


def test_one_token_may_be_the_start_of_another() -> None:
    specials = SpecialTexts(["<a>b", "<a>", "^]", "-", "\\d"])
    for text in ("x <a> y", "<a>bc", "2^]", "a-b", "a\\d"):
        assert specials.is_dangerous(text), text
    for text in ("abc", "12", "x a> y"):
        assert not specials.is_dangerous(text), text


def test_a_long_text_in_a_vocabulary_of_thousands_is_looked_through_once() -> None:
    """No timing is asserted: a search that tries every token everywhere would outlast anybody's patience."""
    specials = SpecialTexts(f"<unused{number}>" for number in range(6000))
    assert not specials.is_dangerous("<unuse " * 100_000 + "x")
    assert specials.is_dangerous("<" * 300_000 + "unused17> x")


def test_a_nonce_has_its_form() -> None:
    assert len(NONCE) == NONCE_DIGITS
    for wrong in ("1" * 39, "x" * 40):
        with pytest.raises(AssertionError):
            Shield(SpecialTexts(SPECIALS), wrong)


# Texts made of the pieces of special tokens: the worst that people could type.
pieces = st.sampled_from(
    ["<", "|", ">", "im", "_", "start", "end", "/", "s", "[", "INST", "]", "<|", "|>", " ", "x", "\n", "S"]
)
nasty = st.lists(pieces, max_size=10).map("".join) | st.text(max_size=20)
frames = st.sampled_from(["", " ", "\n", "<|im_start|>", "<|im_end|>", "<", "<|", "|>", ">", "<|im_", "</", "x"])


@given(st.lists(st.tuples(frames, nasty), min_size=1, max_size=6), frames)
def test_no_template_completes_what_people_wrote(parts: list[tuple[str, str]], end: str) -> None:
    """However a template puts texts side by side, each special token in what is parsed is the template's alone."""
    one = shield()
    hidden = [one.hide(text) for _, text in parts]
    rendered = "".join(frame + text for (frame, _), text in zip(parts, hidden, strict=True)) + end
    segments = one.segments(rendered)
    assert whole(segments) == "".join(frame + text for frame, text in parts) + end

    # Where people's characters stand, in what is parsed: no match may touch one, unless it lies all around it.
    marked = "".join(frame + "\1" * len(text) for (frame, _), text in zip(parts, hidden, strict=True)) + end
    position = 0
    for segment in segments:
        if not segment.is_trusted:
            position = rendered.index(NONCE, position) + NONCE_DIGITS + 7
            continue
        start = rendered.index(segment.text, position)
        position = start + len(segment.text)
        for special in SPECIALS:
            for match in re.finditer(re.escape(special), segment.text):
                owners = marked[start + match.start() : start + match.end()]
                assert owners.strip("\1") == owners, f"{special} begins or ends in people's text"


@given(nasty)
def test_hiding_and_showing_gives_the_text_back(text: str) -> None:
    one = shield()
    assert whole(one.segments(one.hide(text))) == text
    assert one.reveal(one.hide(text)) == text


@given(nasty)
def test_what_is_not_hidden_holds_no_special_token(text: str) -> None:
    one = shield()
    if one.hide(text) == text:
        assert not any(special.lower() in text.lower() for special in SPECIALS)
