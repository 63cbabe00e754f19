"""Templates: what they may use, and that whatever one does ends in a sentence within its limits."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from skulk.engines import template_worker
from skulk.engines.template import TemplateLimits, TemplateRenderer
from skulk.engines.template_worker import Renderer, json_filter, read_frame, write_frame
from skulk.errors import RequestError

NONCE = "3141592653589793238462643383279502884197"
TIGHT = TemplateLimits(cpu_s=0.3, wall_s=5.0, output_bytes=10_000, memory_bytes=64 * 1024 * 1024)


def here(source: str, **variables: Any) -> dict[str, str]:
    """Rendered in this process, without limits of time."""
    return Renderer(source, 10_000).render(NONCE, variables)


class Renderers:
    def __init__(self) -> None:
        self.made: list[TemplateRenderer] = []

    def __call__(self, source: str, limits: TemplateLimits = TIGHT) -> TemplateRenderer:
        self.made.append(TemplateRenderer(source, limits))
        return self.made[-1]


@pytest.fixture
def renderer() -> Iterator[Renderers]:
    renderers = Renderers()
    yield renderers
    for made in renderers.made:
        made.close()


def failure(renderer: TemplateRenderer, **variables: Any) -> str:
    with pytest.raises(RequestError) as caught:
        renderer.render(variables, NONCE)
    assert caught.value.code == "template_failed" and caught.value.http_status == 400
    return caught.value.detail


class TestLanguage:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("{% for m in messages %}{{ m.role }}={{ m['content'] }};{% endfor %}", "user=hi;"),
            ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
            ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
            ("{% set ns = namespace(a=1) %}{% set ns.a = 5 %}{{ ns.a }}", "5"),
            ("{{ {'a': 'é<>&', 'b': [1, none]} | tojson }}", '{"a": "é<>&", "b": [1, null]}'),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            ("{% generation %}mine{% endgeneration %}", "mine"),
            ("{{ tools is none }}{{ absent is defined }}", "TrueFalse"),
            ("{{ strftime_now('%Y') | length }}", "4"),
            ("{{ messages[0].content | trim | upper }}", "HI"),
        ],
    )
    def test_what_chat_templates_use(self, source: str, expected: str) -> None:
        assert here(source, messages=[{"role": "user", "content": "hi"}], tools=None) == {"text": expected}

    def test_a_refusal_carries_the_templates_own_words(self) -> None:
        assert here("{{ raise_exception('no system role, please') }}") == {"refused": "no system role, please"}

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("{% if %}", "line 1"),
            ("a\n{{ 1 +", "line 2"),
            ("{{ absent.field }}", "UndefinedError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ messages.append(1) }}", "SecurityError"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
            ("{% include 'x' %}", "TypeError"),
            ("{{ 'x' * 20000 }}", "more than 10000 bytes"),
            ("{% for a in range(9000) %}xx{% endfor %}", "more than 10000 bytes"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
            ("{{ raise_exception }}" + "{% if 1 %}" * 500 + "{% endif %}" * 500, ""),
        ],
    )
    def test_failures_are_sentences(self, source: str, says: str) -> None:
        answer = here(source, messages=[])
        assert says in answer.get("failed", ""), answer
        assert len(answer.get("failed", "")) < 700

    def test_json_counts_how_often_a_stand_in_was_written(self) -> None:
        tojson = json_filter(NONCE)
        once = tojson({"a": f"{NONCE}0000010"})
        assert once == f'{{"a": "{NONCE}0000011"}}'
        assert f"{NONCE}0000012" in tojson(once)


class TestFrames:
    def test_a_frame_survives_the_pipe(self) -> None:
        pipe = io.BytesIO()
        write_frame(pipe, {"text": "Grüße \ud800"})
        pipe.seek(0)
        assert read_frame(pipe) == {"text": "Grüße ?"}
        assert read_frame(pipe) is None

    def test_a_cut_frame_is_the_end(self) -> None:
        assert read_frame(io.BytesIO(b"\0\0\0\x10{}")) is None
        assert read_frame(io.BytesIO(b"\0\0")) is None

    def test_the_worker_serves_until_its_input_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loop itself, in this process, without touching this process' limits."""
        source, target = io.BytesIO(), io.BytesIO()
        setup = {"template": "{{ a }}!", "max_bytes": 100, "memory_bytes": 1, "cpu_s": 1, "wall_s": 1}
        for frame in (setup, {"nonce": NONCE, "variables": {"a": 1}}, {"nonce": NONCE, "variables": {"a": 2}}):
            write_frame(source, frame)
        source.seek(0)
        timers: list[tuple[float, float]] = []
        monkeypatch.setattr(template_worker, "_limit_memory", lambda _: None)
        monkeypatch.setattr(template_worker, "_set_timers", lambda cpu, wall: timers.append((cpu, wall)))
        monkeypatch.setattr(template_worker.signal, "signal", lambda *_: None)
        monkeypatch.setattr(template_worker.sys, "stdin", io.TextIOWrapper(source))
        monkeypatch.setattr(template_worker.sys, "stdout", io.TextIOWrapper(target))
        assert template_worker.main() == 0
        target.seek(0)
        assert [read_frame(target) for _ in range(4)] == [{"ready": True}, {"text": "1!"}, {"text": "2!"}, None]
        assert timers == [(1, 1), (0, 0)] * 2


class TestProcess:
    def test_renders_and_goes_on(self, renderer: Renderers) -> None:
        one = renderer("{% for m in messages %}{{ m }}{% endfor %}")
        one.start()
        assert one.render({"messages": ["a", "é"]}, NONCE) == "aé"
        assert one.render({"messages": []}, NONCE) == ""

    @pytest.mark.parametrize(
        "source",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set x = seven ** (9 ** 9) %}{{ x }}",
            "{{ ([1] * 10000000) | sort | map('string') | sort | list | length }}" * 50,
        ],
    )
    def test_a_template_that_never_ends_is_stopped(self, renderer: Renderers, source: str) -> None:
        one = renderer(f"{{% if hostile %}}{source}{{% endif %}}fine")
        says = failure(one, hostile=True, seven=7)
        assert "took longer than 0.3 s" in says or "memory" in says
        assert one.render({"hostile": False}, NONCE) == "fine", "the next conversation is served"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ('x' * 10000) * 1000000 }}",
            "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ 'x'.ljust(9999999999) }}",
            "{{ [1] * 10000000000 }}",
        ],
    )
    def test_a_template_that_grows_is_stopped(self, renderer: Renderers, source: str) -> None:
        one = renderer(f"{{% if hostile %}}{source}{{% endif %}}fine")
        says = failure(one, hostile=True)
        assert any(word in says for word in ("memory", "more than 10000 bytes", "took longer", "Overflow")), says
        assert one.render({"hostile": False}, NONCE) == "fine"

    def test_the_template_itself_may_be_the_bomb(self, renderer: Renderers) -> None:
        assert failure(renderer("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"))

    def test_a_refusal_is_told_apart(self, renderer: Renderers) -> None:
        assert "refuses this conversation: no tools" in failure(renderer("{{ raise_exception('no tools') }}"))

    def test_a_large_conversation_passes_both_pipes(self, renderer: Renderers) -> None:
        one = renderer("{{ text }}", TemplateLimits(output_bytes=3_000_000))
        text = "é" * 1_000_000
        assert one.render({"text": text}, NONCE) == text

    def test_a_worker_that_was_killed_is_replaced(self, renderer: Renderers) -> None:
        one = renderer("x")
        one.start()
        worker = one._worker
        assert worker is not None
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert one.render({}, NONCE) == "x"

    def test_close_ends_the_process_and_may_be_repeated(self, renderer: Renderers) -> None:
        one = renderer("x")
        one.start()
        worker = one._worker
        assert worker is not None
        one.close()
        one.close()
        assert worker.returncode == 0
        with pytest.raises(AssertionError):
            one.render({}, NONCE)
