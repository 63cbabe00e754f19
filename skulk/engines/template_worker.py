"""A process that renders one chat template: whatever the template does, this process can be ended.

Templates come with model files, so they are somebody's program. Jinja's sandbox keeps them from Python's inside, but
not from looping or growing; nothing inside a Python process reliably stops that. So they run here, with limits
that the kernel holds: processor time, wall time and memory for each rendering.

Frames on stdin and stdout: 4 bytes of length, big-endian, then JSON.

    first  <- {"template": str, "max_bytes": int, "memory_bytes": int, "cpu_s": float, "wall_s": float}
           -> {"ready": true}
    then   <- {"nonce": str, "variables": {...}}
           -> {"text": str} | {"refused": str} (the template said so) | {"failed": str}

It imports nothing of this project, so that it starts fast and runs by its path alone.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import IO, Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_ERROR_CHARACTERS: Final = 500
_MAX_DEPTH_DIGIT: Final = 9


class RefusedError(Exception):
    """The template called ``raise_exception``."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the model's own turns for training; here its body is just rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def json_filter(nonce: str) -> Callable[..., str]:
    """``tojson`` as chat templates expect it: no escaping for HTML or ASCII.

    Stand-ins of hidden strings are all digits, so JSON leaves them alone; their last digit counts how often the
    string behind must be escaped when it comes back.
    """
    stand_in = re.compile(rf"({nonce}\d{{6}})(\d)")

    def deeper(match: re.Match[str]) -> str:
        return f"{match.group(1)}{min(int(match.group(2)) + 1, _MAX_DEPTH_DIGIT)}"

    def tojson(
        value: Any,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
        sort_keys: bool = False,  # noqa: FBT001, FBT002
    ) -> str:
        text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
        return stand_in.sub(deeper, text)

    return tojson


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it since transformers set the custom."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    own: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(own)
    # In place before anything is compiled, for Jinja computes filters of constants then; those hold no stand-ins.
    environment.filters["tojson"] = json_filter("-")
    return environment


class Renderer:
    """One template, compiled at its first use, under that use's limits."""

    def __init__(self, source: str, max_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._environment = make_environment()
        self._template: jinja2.Template | None = None

    def render(self, nonce: str, variables: dict[str, Any]) -> dict[str, str]:
        """One answer frame. Border: whatever a template raises becomes a sentence."""
        try:
            if self._template is None:
                self._template = self._environment.from_string(self._source)
            self._environment.filters["tojson"] = json_filter(nonce)
            return self._generate(self._template, variables)
        except RefusedError as error:
            return {"refused": _short(error)}
        except jinja2.TemplateSyntaxError as error:
            return {"failed": f"it can't be parsed, line {error.lineno}: {_short(error.message or '')}"}
        except MemoryError:
            return {"failed": "it needs too much memory"}
        except RecursionError:
            return {"failed": "it is nested too deep"}
        except Exception as error:  # noqa: BLE001 - the named border of this process
            return {"failed": f"{type(error).__name__}: {_short(error)}"}

    def _generate(self, template: jinja2.Template, variables: dict[str, Any]) -> dict[str, str]:
        parts: list[str] = []
        size = 0
        for part in template.generate(variables):
            size += len(part.encode("utf-8", "replace"))
            if size > self._max_bytes:
                return {"failed": f"it makes more than {self._max_bytes} bytes of text"}
            parts.append(part)
        return {"text": "".join(parts)}


def _short(error: object) -> str:
    return str(error)[:MAX_ERROR_CHARACTERS]


def read_frame(source: IO[bytes]) -> Any:
    """The next frame; None at the end of the stream."""
    head = source.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    body = source.read(size)
    return json.loads(body) if len(body) == size else None


def write_frame(target: IO[bytes], frame: dict[str, Any]) -> None:
    """Sends one frame."""
    body = json.dumps(frame, ensure_ascii=False).encode("utf-8", "replace")
    target.write(len(body).to_bytes(4, "big") + body)
    target.flush()


def _limit_memory(memory_bytes: int) -> None:
    """Address space: what is used now and ``memory_bytes`` more. Where it can't be limited, time still is."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, hard))
    except (OSError, ValueError):
        return


def _set_timers(cpu_s: float, wall_s: float) -> None:
    """Arms, or with zeros disarms, the kernel's timers; their signals end the process, C code or not."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def main() -> int:
    """Serves frames until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    setup = read_frame(source)
    if setup is None:
        return 0
    renderer = Renderer(setup["template"], setup["max_bytes"])
    _limit_memory(setup["memory_bytes"])
    write_frame(target, {"ready": True})
    while (request := read_frame(source)) is not None:
        _set_timers(setup["cpu_s"], setup["wall_s"])
        answer = renderer.render(request["nonce"], request["variables"])
        _set_timers(0, 0)
        try:
            write_frame(target, answer)
        except BrokenPipeError:
            # The parent is gone. What still stands in the buffer can't be flushed at exit, so there is no such exit.
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
