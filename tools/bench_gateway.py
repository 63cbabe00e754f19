"""What bus and gateway add to a stream, beside the same engine behind a bare aiohttp server.

The engine is none: it emits tokens at a set rate, so the model is in no number. Both sides run one after the other, in
turned order, round by round; figures are differences within a round. Run it on a machine that does nothing else.

    python tools/bench_gateway.py                        1, 50 and 500 streams
    python tools/bench_gateway.py --flood                tokens a second of gateway CPU, events written in one go
    python tools/bench_gateway.py --memory 1000          resident memory of the gateway with so many streams
    python tools/bench_gateway.py --overload 10          ten times the load that the model has slots for
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import number, percentile, table  # noqa: E402
from bench_gateway_sides import Heard, Load  # noqa: E402

from skulk.wire.base import encode  # noqa: E402
from tests.support.http import spec  # noqa: E402
from tests.support.nats import NatsServer  # noqa: E402

SIDES: Final = Path(__file__).resolve().parent / "bench_gateway_sides.py"
MIB: Final = 1024 * 1024
START_S: Final = 30.0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one side: seconds, and of the serving process CPU seconds and resident bytes."""

    heard: list[Heard]
    cpu_s: float
    rss_bytes: int

    @property
    def whole(self) -> list[Heard]:
        """The streams that came to their end."""
        return [one for one in self.heard if one.is_whole]

    @property
    def tokens(self) -> int:
        """Tokens that clients got."""
        return sum(len(one.waits) for one in self.heard)

    def ttft(self, share: float) -> float:
        """Percentile of the time to the first token, in milliseconds."""
        return 1000 * percentile([one.first_s for one in self.whole], share)

    def gap(self, share: float) -> float:
        """Percentile of the time between two tokens of a stream, in milliseconds."""
        return 1000 * percentile([gap for one in self.whole for gap in one.gaps], share)

    def wait(self, share: float) -> float:
        """Percentile of the way from the engine's hand to the client's, in milliseconds."""
        return 1000 * percentile([wait for one in self.whole for wait in one.waits], share)


def part(*arguments: str) -> subprocess.Popen[bytes]:
    """One process of the bench; its first line says that it is ready."""
    return subprocess.Popen([sys.executable, str(SIDES), *arguments], stdout=subprocess.PIPE)


def first_line(process: subprocess.Popen[bytes]) -> str:
    """What a part says when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        raise SystemExit("a part of the bench ended before it was ready; its error stands above")
    return line


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Generator[subprocess.Popen[bytes]]:
    """Ends a part with the block."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def our_side(load: Load) -> Generator[tuple[int, psutil.Process]]:
    """nats-server, engine and the real gateway; its port and process."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skulk-bench-")))
        server = stack.enter_context(NatsServer())
        engine = stack.enter_context(ended(part("engine", server.url, msgspec.json.encode(load).decode())))
        first_line(engine)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        told = spec(home, nats_url=server.url, api_port=port, request_timeout_s=600.0, log_level="warning")
        gateway = stack.enter_context(
            ended(subprocess.Popen([sys.executable, "-m", "skulk.gateway"], stdin=subprocess.PIPE, cwd=ROOT))
        )
        assert gateway.stdin is not None
        # it stays open: a gateway whose parent closes it leaves
        gateway.stdin.write(encode(told) + b"\n")
        gateway.stdin.flush()
        _until_serving(port)
        yield port, psutil.Process(gateway.pid)


@contextlib.contextmanager
def bare_side(load: Load) -> Generator[tuple[int, psutil.Process]]:
    """The bare server's port and process."""
    with ended(part("bare", msgspec.json.encode(load).decode())) as process:
        yield int(first_line(process)), psutil.Process(process.pid)


def _until_serving(port: int) -> None:
    """Asks until one stream has come whole: the gateway has heard of the instance."""
    give_up_at = time.monotonic() + START_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(ConnectionError, subprocess.CalledProcessError):
            if all(one.is_whole for one in clients(port, 1)):
                return
        time.sleep(0.1)
    raise SystemExit("the gateway did not serve; its log stands above")


def clients(port: int, streams: int, spread_s: float = 0.0) -> list[Heard]:
    """So many streams from one process of clients."""
    command = [sys.executable, str(SIDES), "client", str(port), str(streams), str(spread_s)]
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    return msgspec.json.decode(told, type=list[Heard])


def measure(side: tuple[int, psutil.Process], streams: int, spread_s: float) -> Round:
    """One round of one side that runs already."""
    port, process = side
    before = process.cpu_times()
    heard = clients(port, streams, spread_s)
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return Round(heard=heard, cpu_s=cpu_s, rss_bytes=process.memory_info().rss)


def pairs(load: Load, streams: int, rounds: int) -> tuple[list[Round], list[Round]]:
    """Both sides in turned order; the first pair warms up and does not count."""
    ours: list[Round] = []
    bare: list[Round] = []
    # streams begin within one step of each other, not at one instant
    spread_s = 0.0 if streams == 1 else max(1.0, streams / 100)
    with our_side(load) as us, bare_side(load) as them:
        for turn in range(rounds + 1):
            for is_ours in (True, False) if turn % 2 else (False, True):
                (ours if is_ours else bare).append(measure(us if is_ours else them, streams, spread_s))
    return ours[1:], bare[1:]


def added(ours: Sequence[Round], bare: Sequence[Round], figure: Callable[[Round], float]) -> float:
    """Median over the rounds of the difference within a round."""
    return statistics.median(figure(one) - figure(other) for one, other in zip(ours, bare, strict=True))


def latency(streams: Sequence[int], rates: Sequence[float], tokens: int, rounds: int) -> str:
    """The table of what is added to time to first token, to each token and between tokens."""
    header = (
        "streams x tokens/s",
        "TTFT p50",
        "TTFT p99",
        "a token p50",
        "p99",
        "between p50",
        "p99",
        "CPU us/token",
        "MiB",
    )
    rows: list[tuple[str, ...]] = []
    for count, rate in zip(streams, rates, strict=True):
        ours, bare = pairs(Load(tokens=tokens, rate=rate), count, rounds)
        lost = sum(len(one.heard) - len(one.whole) for one in (*ours, *bare))
        figures = [
            added(ours, bare, figure)
            for kind in (Round.ttft, Round.wait, Round.gap)
            for figure in (partial(kind, share=0.5), partial(kind, share=0.99))
        ]
        cpu_us = statistics.median(1e6 * one.cpu_s / max(1, one.tokens) for one in ours)
        rss = max(one.rss_bytes for one in ours) / MIB
        note = f"{count} x {rate:g}" + (f" ({lost} streams broke)" if lost else "")
        rows.append((note, *(number(one) for one in figures), number(cpu_us, 1), number(rss, 0)))
    return "Added by bus and gateway, ms, medians of the differences in pairs:\n\n" + table(header, rows)


def flood(streams: int, tokens: int, rounds: int) -> str:
    """How many tokens a second of its CPU the gateway carries when the engine gives all at once."""
    with our_side(Load(tokens=tokens, rate=0.0)) as us:
        found = [measure(us, streams, 0.0) for _ in range(rounds + 1)][1:]
    rows = [
        (str(at + 1), str(one.tokens), number(one.cpu_s), number(one.tokens / max(one.cpu_s, 1e-9), 0))
        for at, one in enumerate(found)
    ]
    return f"{streams} streams of {tokens} tokens, all at once:\n\n" + table(
        ("round", "tokens", "CPU s", "tokens/s of CPU"), rows
    )


def memory(streams: int) -> str:
    """Resident memory of the gateway while that many streams are open."""
    with our_side(Load(tokens=30, rate=2.0)) as us:
        empty = us[1].memory_info().rss
        most = 0
        command = [sys.executable, str(SIDES), "client", str(us[0]), str(streams), "5"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            while running.poll() is None and not _has_output(running):
                most = max(most, us[1].memory_info().rss)
            heard = msgspec.json.decode(running.stdout.read(), type=list[Heard])
    whole = sum(one.is_whole for one in heard)
    return f"{whole} of {streams} streams whole; gateway {most / MIB:.0f} MiB at most, {empty / MIB:.0f} MiB before"


def _has_output(process: subprocess.Popen[bytes]) -> bool:
    import select

    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.2)[0])


def overload(times: float, slots: int, seconds: float) -> str:
    """What admitted requests see at the load that the model has slots for, and at ``times`` as much."""
    load = Load(tokens=20, rate=20.0, slots=slots)
    rows: list[tuple[str, ...]] = []
    with our_side(load) as us:
        # a stream takes a second of a slot
        for factor in (1.0, times):
            streams = round(slots * factor * seconds)
            found = measure(us, streams, seconds)
            refused = [one for one in found.heard if one.status in (429, 503)]
            broken = len(found.heard) - len(found.whole) - len(refused)
            slow = 1000 * percentile([one.first_s for one in refused], 0.99)
            rows.append(
                (
                    f"{factor:g} x",
                    str(len(found.whole)),
                    str(len(refused)),
                    str(broken),
                    *(number(found.ttft(share), 0) for share in (0.5, 0.99)),
                    *(number(found.gap(share), 1) for share in (0.5, 0.99)),
                    number(slow, 1),
                    number(found.rss_bytes / MIB, 0),
                )
            )
    header = ("load", "whole", "refused", "broken", "TTFT p50", "p99", "gap p50", "p99", "refusal p99", "MiB")
    return f"{slots} slots, a stream takes one for a second; ms:\n\n" + table(header, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 50, 500], help="streams at a time")
    parser.add_argument("--rate", type=float, nargs="+", default=[50, 50, 10], help="tokens a second of each stream")
    parser.add_argument("--tokens", type=int, default=150, help="tokens of a stream (default: 150)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of rounds, after one that warms up (default: 5)")
    parser.add_argument("--flood", action="store_true", help="the engine gives all tokens at once")
    parser.add_argument("--memory", type=int, metavar="N", help="resident memory with N streams open")
    parser.add_argument("--overload", type=float, metavar="X", help="X times the load that there are slots for")
    parser.add_argument("--slots", type=int, default=16, help="of the model, for --overload (default: 16)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, for --overload (default: 20)")
    told = parser.parse_args(arguments)
    if len(told.streams) != len(told.rate):
        parser.error("give --rate as many values as --streams")
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what was asked for and prints its table."""
    told = parse(arguments)
    if told.flood:
        print(flood(told.streams[0] if told.streams != [1, 50, 500] else 20, told.tokens * 10, told.rounds))
    elif told.memory:
        print(memory(told.memory))
    elif told.overload:
        print(overload(told.overload, told.slots, told.seconds))
    else:
        print(latency(told.streams, told.rate, told.tokens, told.rounds))


if __name__ == "__main__":
    main()
