"""Sets up what `make test-vulkan` runs on: the Vulkan build of the engine, and a Vulkan driver that needs no GPU.

Everything lies under `build/vulkan/`; nothing is installed, root isn't needed. Fetched are, by apt from the sources
that this machine has, but with lists and archives of its own (`build/vulkan/apt/`):

    of this release        mesa-vulkan-drivers (its lavapipe computes on the CPU), libvulkan1, glslc, vulkan-tools, and
                           what of their needs isn't installed
    of the same release,   libvulkan-dev and spirv-headers, for their headers: llama.cpp needs Vulkan 1.3.275 or newer.
    on Debian 12 of 13     Debian 12 has 1.3.239; there they come from Debian 13, through a second source

and by pip what `make dev` fetches, into `build/vulkan/venv`. There llama-cpp-python of the lock is compiled with
`-DGGML_VULKAN=on` (about 10 minutes on two cores); the wheel is kept beside the CPU build's. A second call is quick.
`build/vulkan/env.sh` then holds the variables under which llama.cpp finds the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from engine_wheel import say

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "vulkan"
RUNTIME = ("mesa-vulkan-drivers", "libvulkan1", "glslc", "vulkan-tools")
HEADERS = ("libvulkan-dev", "spirv-headers")
OLDEST_HEADERS = (1, 3, 275)
NEWER_RELEASE = {"bookworm": "trixie"}
"""Releases whose Vulkan headers are too old, and where to take newer ones from."""


class VulkanError(Exception):
    """The set-up cannot go on; the text is one sentence that says what to do."""


class Source(NamedTuple):
    """An apt source of its own: a folder for its lists and archives, and the file that names it."""

    folder: Path
    file: Path

    def apt(self, *words: str) -> None:
        """Runs apt-get on this source alone; the machine's settings (proxies, keys) hold, its state isn't touched."""
        options = {
            "APT::Sandbox::User": "",
            "Debug::NoLocking": "1",
            "Dir::State": self.folder / "state",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": self.file,
            "Dir::Etc::sourceparts": "-",
        }
        archives = self.folder / "cache" / "archives"
        for place in (self.folder / "state" / "lists" / "partial", archives / "partial"):
            place.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items()), *words]
        if subprocess.run(command, check=False, stdin=subprocess.DEVNULL, cwd=archives).returncode != 0:
            raise VulkanError(f"apt-get {' '.join(words)} failed (see above). Check the network and apt's sources.")

    def unpack(self, target: Path) -> None:
        """Unpacks every archive that was fetched."""
        target.mkdir(parents=True, exist_ok=True)
        for archive in sorted((self.folder / "cache" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", str(archive), str(target)], check=True)


def main(arguments: list[str]) -> int:
    """Sets up; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/setup_vulkan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages-only", action="store_true", help="fetch and unpack, compile nothing")
    flags = parser.parse_args(arguments)
    try:
        root = packages()
        variables = environment(root)
        (HOME / "env.sh").write_text(
            "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()), encoding="utf-8"
        )
        return 0 if flags.packages_only else compile_engine(root, variables)
    except VulkanError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1


def packages() -> Path:
    """Fetches and unpacks the packages once; gives the folder that looks like `/`.

    Raises:
        VulkanError: no apt here, or it failed.
    """
    root, stamp = HOME / "root", HOME / "packages.json"
    wanted = json.dumps({"runtime": RUNTIME, "headers": HEADERS})
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise VulkanError("this set-up takes its packages from apt; run it on Debian or Ubuntu.")
    shutil.rmtree(HOME / "apt", ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    release = os_release()
    own = source("own", release)
    say(f"Fetching {', '.join(RUNTIME)} of {release} into {HOME}")
    own.apt("update")
    own.apt("install", "--yes", "--no-install-recommends", "--download-only", "--reinstall", *RUNTIME)
    own.unpack(root)
    newer = source("headers", NEWER_RELEASE.get(release, release))
    say(f"Fetching {', '.join(HEADERS)} of {NEWER_RELEASE.get(release, release)}, for their headers")
    newer.apt("update")
    newer.apt("download", *HEADERS)
    newer.unpack(root)
    if (found := header_version(root)) < OLDEST_HEADERS:
        raise VulkanError(
            f"the Vulkan headers of {release} are {'.'.join(map(str, found))}; llama.cpp needs "
            f"{'.'.join(map(str, OLDEST_HEADERS))}. Name a newer release in NEWER_RELEASE of this program."
        )
    stamp.write_text(wanted, encoding="utf-8")
    return root


def os_release() -> str:
    """The code name of this release, `bookworm`."""
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r"^VERSION_CODENAME=\"?([a-z]+)", text, re.MULTILINE)
    if match is None:
        raise VulkanError("/etc/os-release names no release; run this on Debian or Ubuntu.")
    return match[1]


def source(name: str, release: str) -> Source:
    """A private source: the machine's own archive, with the suite of a release.

    Raises:
        VulkanError: apt has no source with this machine's release.
    """
    folder = HOME / "apt" / name
    folder.mkdir(parents=True, exist_ok=True)
    uri, keys = own_archive(os_release())
    file = folder / "private.sources"
    text = f"Types: deb\nURIs: {uri}\nSuites: {release}\nComponents: main\n"
    file.write_text(text + (f"Signed-By: {keys}\n" if keys else ""), encoding="utf-8")
    return Source(folder, file)


def own_archive(release: str) -> tuple[str, str]:
    """Where this machine takes its own release from, and the key file; in either of apt's two forms."""
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for text in (place.read_text(encoding="utf-8") for place in places if place.is_file()):
        for part in text.split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.+)$", part, re.MULTILINE))
            if release in fields.get("Suites", "").split() and fields.get("URIs"):
                return fields["URIs"].split()[0], fields.get("Signed-By", "")
        line = re.search(rf"^deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+{release}\s", text, re.MULTILINE)
        if line is not None:
            keys = re.search(r"signed-by=(\S+)", line[1] or "")
            return line[2], keys[1] if keys else ""
    raise VulkanError(f"no source of apt names {release}; mend /etc/apt/sources.list.d.")


def header_version(root: Path) -> tuple[int, ...]:
    """The version of the unpacked Vulkan headers."""
    text = (root / "usr/include/vulkan/vulkan_core.h").read_text(encoding="utf-8")
    patch = re.search(r"^#define VK_HEADER_VERSION (\d+)", text, re.MULTILINE)
    complete = re.search(r"VK_MAKE_API_VERSION\(\d+, (\d+), (\d+), VK_HEADER_VERSION\)", text)
    assert patch is not None and complete is not None, "vulkan_core.h has another form"
    return int(complete[1]), int(complete[2]), int(patch[1])


def environment(root: Path) -> dict[str, str]:
    """Variables under which the unpacked libraries and the driver are found, and llama.cpp takes a CPU for a GPU.

    Raises:
        VulkanError: the packages brought no lavapipe.
    """
    manifests = sorted((root / "usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not manifests:
        raise VulkanError(f"{root} has no lavapipe driver; remove {HOME} and run again.")
    driver = json.loads(manifests[0].read_text(encoding="utf-8"))
    library = next(root.glob(f"usr/lib/**/{Path(driver['ICD']['library_path']).name}"))
    driver["ICD"]["library_path"] = str(library)
    manifest = HOME / "lavapipe.json"
    manifest.write_text(json.dumps(driver, indent=1) + "\n", encoding="utf-8")
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        "LD_LIBRARY_PATH": f"{library.parent}{os.pathsep + inherited if inherited else ''}",
        "VK_DRIVER_FILES": str(manifest),
        "VK_ICD_FILENAMES": str(manifest),
        "GGML_VK_VISIBLE_DEVICES": "0",
    }


def compile_engine(root: Path, variables: dict[str, str]) -> int:
    """The environment of `make dev` with the engine built for Vulkan; compiled once, then taken from the cache."""
    # The paths travel beside CMAKE_ARGS: that is part of the wheel's key in the cache, and they belong to this clone.
    building = {
        **os.environ,
        **variables,
        "PATH": f"{root / 'usr/bin'}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_ARGS": "-DGGML_VULKAN=on",
        "CMAKE_PREFIX_PATH": str(root / "usr"),
        "VULKAN_SDK": str(root / "usr"),
    }
    setup = [sys.executable, str(ROOT / "tools/setup_env.py"), "--venv", str(HOME / "venv")]
    return subprocess.run([*setup, "--extra", "demo", "--extra", "dev"], check=False, env=building).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
