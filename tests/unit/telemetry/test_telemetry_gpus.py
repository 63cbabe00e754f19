"""GPUs as drivers tell of them, on made-up trees and texts."""

from __future__ import annotations

from pathlib import Path

from skulk.telemetry.gpus import amd, parse_smi
from skulk.units import MIB
from skulk.wire.beats import Accelerator


def card(root: Path, name: str, **files: str) -> None:
    folder = root / "sys/class/drm" / name / "device"
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


def test_amd_cards_by_the_kernel_s_files(tmp_path: Path) -> None:
    card(
        tmp_path,
        "card1",
        vendor="0x1002",
        device="0x1586",
        mem_info_vram_total="536870912",
        mem_info_vram_used="1000",
        mem_info_gtt_total="133143986176",
        mem_info_gtt_used="2000",
    )
    card(tmp_path, "card1-HDMI-A-1", vendor="0x1002", mem_info_vram_total="5")
    card(tmp_path, "card0", vendor="0x10de", mem_info_vram_total="5")
    card(tmp_path, "card2", vendor="0x1002")
    assert amd(tmp_path) == (
        Accelerator(
            vendor="amd",
            name="AMD GPU 0x1586",
            vram_total_bytes=536_870_912,
            vram_used_bytes=1000,
            gtt_total_bytes=133_143_986_176,
            gtt_used_bytes=2000,
        ),
    )


def test_a_product_s_name_is_preferred(tmp_path: Path) -> None:
    card(tmp_path, "card0", vendor="0x1002", product_name="Radeon Pro", mem_info_vram_total="5")
    assert amd(tmp_path)[0].name == "Radeon Pro"


def test_a_machine_without_drm_has_no_amd_gpu(tmp_path: Path) -> None:
    assert amd(tmp_path) == ()


def test_nvidia_lines() -> None:
    assert parse_smi("NVIDIA GeForce RTX 4090, 24564, 1010\nNVIDIA GB10, [N/A], [N/A]\n\nnonsense\n") == (
        Accelerator(
            vendor="nvidia",
            name="NVIDIA GeForce RTX 4090",
            vram_total_bytes=24564 * MIB,
            vram_used_bytes=1010 * MIB,
        ),
    )
