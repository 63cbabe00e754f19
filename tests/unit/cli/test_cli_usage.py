"""Words, flags and exit statuses; nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from skulk import __version__
from skulk.cli.commands import COMMANDS
from skulk.cli.main import CHILDREN
from skulk.settings_options import MASK, OPTIONS
from tests.support.command_line import Outcome, caller, command, process_environ

Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    return caller(capsys, {"SKULK_HOME": str(tmp_path)})


def test_every_command_has_a_module_and_help(call: Call):
    listed = call("--help").out
    for entry in COMMANDS:
        assert callable(import_module(f"skulk.cli.{entry.module}").run)
        assert f"    {entry.name} " in listed
        assert entry.help in " ".join(listed.split())
    for name in CHILDREN:
        assert name not in listed


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["ps", "--fly"],
        ["up", "--api-p", "1"],
        ["chat"],
        ["chat", " "],
        ["place"],
        ["place", "m", "--replicas", "0"],
        ["place", "m", "--context", "many"],
        ["rm"],
        ["up", "--api", "http://x"],
        ["pull"],
        ["pull", "m", "--pin", "--unpin"],
        ["bench", "m"],
    ],
)
def test_wrong_usage_is_status_2(words: list[str], call: Call):
    answer = call(*words)
    assert answer.status == 2
    assert answer.err.startswith("usage: skulk")


def test_an_argument_that_is_no_text_is_told(call: Call):
    answer = call("place", "model-\udcff")
    assert answer.status == 2
    assert "UTF-8" in answer.err


def test_settings_that_are_not_accepted_are_status_2_and_one_line(call: Call):
    answer = call("config", "--api-port", "many")
    assert answer == (
        2,
        "",
        "skulk: flag --api-port: 'many' isn't accepted; give a port from 1 to 65535, or 0 for a free one.\n",
    )


def test_greet_needs_something_to_greet_with(call: Call):
    for words in (["up", "--greet"], ["up", "--greet", "--place", "m", "--no-api"]):
        answer = call(*words)
        assert (answer.status, answer.err.count("\n")) == (2, 1)
        assert "--greet asks a model through the API" in answer.err


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(words: list[str], call: Call):
    assert call(*words) == (0, f"skulk {__version__}\n", "")


def test_config_shows_every_setting_with_its_source_and_no_secret(call: Call, tmp_path: Path):
    (tmp_path / "skulk.toml").write_text('cluster = "attic"\nhf_token = "hf_secret"\n')
    answer = call(
        "config",
        "--api-port",
        "8080",
        SKULK_API_KEYS="ann:sk-secret",
        SKULK_NATS_URL="nats://u:secret@box",
        SKULK_PLACES="x",
    )
    assert answer.status == 0
    assert "secret" not in answer.out + answer.err
    lines = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines()[1:]}
    assert lines["cluster"] == ["attic", "skulk.toml"]
    assert lines["api_port"] == ["8080", "flag", "--api-port"]
    assert lines["api_keys"] == [MASK, "environment", "SKULK_API_KEYS"]
    assert lines["nats_url"] == [f"nats://{MASK}@box", "environment", "SKULK_NATS_URL"]
    assert lines["max_body"] == ["64MiB", "default"]
    assert set(lines) == {option.key for option in OPTIONS}
    assert "SKULK_PLACES is no variable that this version knows (did you mean SKULK_PLACE?)" in answer.err
    rows = json.loads(call("config", "--json").out)
    assert rows[0] == {
        "setting": "home",
        "value": str(tmp_path),
        "source": "environment SKULK_HOME",
        "environment": "SKULK_HOME",
    }


def test_flags_of_lists_may_be_repeated(call: Call):
    rows = json.loads(call("config", "--json", "--place", "a", "--place", "b", "--bootstrap-peers", "x,y").out)
    values = {row["setting"]: row["value"] for row in rows}
    assert values["place"] == "a,b"
    assert values["bootstrap_peers"] == "x:52416,y:52416"


def test_every_flag_reaches_its_setting(call: Call):
    texts = {"--log-format": "json", "--api-host": "::1", "--cluster": "c", "--bootstrap-peers": "a", "--place": "m"}
    for option in OPTIONS:
        if not option.flag or option.audience == "client":
            continue
        value = [] if option.flag_value else [texts.get(option.flag, "7")]
        row = next(
            row for row in json.loads(call("config", "--json", option.flag, *value).out) if row["setting"] == option.key
        )
        assert row["source"] == f"flag {option.flag}"


def test_help_imports_nothing_heavy(tmp_path: Path):
    code = (
        "import sys; from skulk.cli.main import main\n"
        "try: main(['up', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'asyncio', 'aiohttp', 'nats', 'llama_cpp', 'numpy', 'huggingface_hub', 'zeroconf', 'jinja2'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=process_environ(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith("LOADED []\n")


def test_python_m_skulk_is_skulk(tmp_path: Path):
    done = subprocess.run(
        command("version"), env=process_environ(tmp_path), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"skulk {__version__}\n"
