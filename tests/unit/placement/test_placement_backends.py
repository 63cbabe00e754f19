"""Tags: grammar and resolution; the card's order decides."""

from __future__ import annotations

import pytest

from skulk.placement.backends import parse_tag, rank_of, resolve, tags_for


@pytest.mark.parametrize(
    ("text", "engine", "compute"),
    [
        ("mlx", "mlx", ""),
        ("mlx-metal", "mlx", "metal"),
        ("llama_cpp", "llama_cpp", ""),
        ("llama_cpp-cpu", "llama_cpp", "cpu"),
    ],
)
def test_a_tag_has_an_engine_and_perhaps_a_compute(text: str, engine: str, compute: str) -> None:
    tag = parse_tag(text)
    assert tag == (engine, compute)
    assert str(tag) == text


@pytest.mark.parametrize("text", ["", "-", "llama.cpp", "Llama_cpp", "a-b-c", "llama_cpp-", "mlx metal"])
def test_anything_else_is_no_tag(text: str) -> None:
    assert parse_tag(text) is None


@pytest.mark.parametrize(
    ("accepted", "advertised", "expected"),
    [
        (("llama_cpp-vulkan", "llama_cpp-cpu"), ("llama_cpp", "llama_cpp-vulkan"), "llama_cpp-vulkan"),
        (("llama_cpp-vulkan", "llama_cpp-cpu"), ("llama_cpp", "llama_cpp-cpu", "llama_cpp-vulkan"), "llama_cpp-vulkan"),
        (("llama_cpp-cpu", "llama_cpp-vulkan"), ("llama_cpp", "llama_cpp-vulkan", "llama_cpp-cpu"), "llama_cpp-cpu"),
        (("llama_cpp",), ("llama_cpp", "llama_cpp-cpu", "llama_cpp-cuda"), "llama_cpp-cuda"),
        (("llama_cpp",), ("llama_cpp", "llama_cpp-zeta", "llama_cpp-alpha"), "llama_cpp-alpha"),
        (("mlx-metal",), ("llama_cpp", "llama_cpp-cpu"), None),
        (("llama_cpp-cpu",), ("llama_cpp",), None),
        (("llama.cpp", "llama_cpp-cpu"), ("???", "llama_cpp-cpu"), "llama_cpp-cpu"),
        ((), ("llama_cpp-cpu",), None),
        (("llama_cpp-cpu",), (), None),
    ],
)
def test_the_first_accepted_tag_that_is_offered_wins(
    accepted: tuple[str, ...], advertised: tuple[str, ...], expected: str | None
) -> None:
    assert resolve(accepted, advertised) == expected


def test_the_rank_is_the_place_in_the_card() -> None:
    found = rank_of(("llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cpu"), ("llama_cpp-cpu",))
    assert found == ("llama_cpp-cpu", 2)


def test_a_node_advertises_the_bare_engine_first_and_nothing_without_a_compute() -> None:
    assert tags_for("llama_cpp", ["vulkan", "cpu", "vulkan"]) == ("llama_cpp", "llama_cpp-vulkan", "llama_cpp-cpu")
    assert tags_for("llama_cpp", []) == ()
