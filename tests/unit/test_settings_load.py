"""Where settings come from, who wins, and the sentence for what isn't accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import StartError
from skulk.settings import Settings
from skulk.settings_load import LoadedSettings, is_loopback, load_settings, resolve, toml_of
from skulk.settings_options import OPTIONS
from skulk.settings_values import Raw
from skulk.supervision.ready import READY_FD

# Every variable of the specification, with a value that differs from its default and what it must become.
ENVIRONMENT: dict[str, tuple[str, str, Any]] = {
    "SKULK_LLAMA_CPP_BACKENDS": ("vulkan,cpu", "backends", ("vulkan", "cpu")),
    "SKULK_LLAMA_CPP_LOGITS_ALL": ("1", "logits_all", True),
    "SKULK_LLAMA_CPP_LOGITS_ALL_N_CTX": ("4096", "logits_all_n_ctx", 4096),
    "SKULK_LLAMA_CPP_FLASH_ATTN": ("on", "flash_attention", "on"),
    "SKULK_LLAMA_CPP_PARALLEL": ("4", "parallel", 4),
    "SKULK_LLAMA_CPP_THREADS": ("6", "threads", 6),
    "SKULK_LLAMA_CPP_BATCH": ("1024", "batch", 1024),
    "SKULK_LLAMA_CPP_UBATCH": ("256", "ubatch", 256),
    "SKULK_LLAMA_CPP_KV_TYPE": ("q8_0", "kv_type", "q8_0"),
    "SKULK_LLAMA_CPP_GPU_LAYERS": ("12", "gpu_layers", 12),
    "SKULK_BOOTSTRAP_PEERS": (
        "10.0.0.5,/ip4/10.0.0.6/tcp/7000",
        "bootstrap_peers",
        ("10.0.0.5:52416", "10.0.0.6:7000"),
    ),
    "SKULK_HOME": ("/srv/skulk", "home", "/srv/skulk"),
    "SKULK_MODELS_DIR": ("/srv/models", "models_dir", "/srv/models"),
    "SKULK_MODELS_PATH": ("/mnt/a,/mnt/b", "models_path", ("/mnt/a", "/mnt/b")),
    "SKULK_MEMORY_LIMIT": ("24GiB", "memory_limit_bytes", 24 * 2**30),
    "SKULK_OFFLINE": ("true", "offline", True),
    "SKULK_NODE_PARTICIPATION": ("management", "participation", "management"),
    "SKULK_NATS_URL": ("nats://10.0.0.9:4222", "nats_url", "nats://10.0.0.9:4222"),
    "SKULK_NATS_SERVER": ("/usr/local/bin/nats-server", "nats_server", "/usr/local/bin/nats-server"),
    "SKULK_CLUSTER_TOKEN": ("hush", "cluster_token", "hush"),
    "SKULK_API_KEYS": ("sk-1, sk-2", "api_keys", ("sk-1", "sk-2")),
    "SKULK_ALLOWED_HOSTS": ("skulk.lan", "allowed_hosts", ("skulk.lan",)),
    "SKULK_AUTO_PLACE": ("off", "auto_place", "off"),
    "SKULK_IDLE_TTL": ("30", "idle_ttl_s", 30.0),
    "SKULK_LOAD_WAIT_S": ("5", "load_wait_s", 5.0),
    "SKULK_REQUEST_TIMEOUT_S": ("90", "request_timeout_s", 90.0),
    "SKULK_STEP_TIMEOUT_S": ("45.5", "step_timeout_s", 45.5),
    "SKULK_REPLACE_AFTER": ("20", "replace_after_s", 20.0),
    "SKULK_MAX_BODY": ("1MiB", "max_body_bytes", 2**20),
    "HF_TOKEN": ("hf_abc", "hf_token", "hf_abc"),
    "HF_ENDPOINT": ("https://hub.example", "hf_endpoint", "https://hub.example"),
    "HF_HOME": ("/srv/hf", "hf_home", "/srv/hf"),
    "SKULK_API_HOST": ("127.0.0.1", "api_host", "127.0.0.1"),
    "SKULK_API_PORT": ("8080", "api_port", 8080),
    "SKULK_NATS_PORT": ("8081", "nats_port", 8081),
    "SKULK_ROUTE_PORT": ("8082", "route_port", 8082),
    "SKULK_FILES_PORT": ("0", "files_port", 0),
    "SKULK_CLUSTER": ("attic", "cluster", "attic"),
    "SKULK_NO_MDNS": ("1", "mdns", False),
    "SKULK_LOCAL": ("yes", "local", True),
    "SKULK_NO_API": ("1", "api", False),
    "SKULK_LOG_FORMAT": ("json", "log_format", "json"),
    "SKULK_PLACE": ("org/a,org/b", "place", ("org/a", "org/b")),
    "SKULK_API": ("http://box:52415/", "api_url", "http://box:52415"),
}

# The twins of the specification's flags.
FLAGS = {
    "--home", "--api-host", "--api-port", "--nats-port", "--route-port", "--cluster", "--bootstrap-peers", "--no-mdns",
    "--local", "--no-api", "--no-worker", "--offline", "--files-port", "--log-format", "--place",
}  # fmt: skip


def load(
    tmp_path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Raw] | None = None,
    toml: str = "",
    **rest: Any,
) -> LoadedSettings:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    if toml:
        (home / "skulk.toml").write_text(toml)
    return load_settings(environ={"SKULK_HOME": str(home), **(environ or {})}, flags=flags, **rest)


def refusal(tmp_path: Path, **sources: Any) -> str:
    with pytest.raises(StartError) as caught:
        load(tmp_path, **sources)
    assert caught.value.code == "config_invalid"
    assert caught.value.exit_status == 2
    return caught.value.detail


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
def test_every_variable_of_the_specification_is_accepted(name: str, tmp_path: Path):
    text, field, expected = ENVIRONMENT[name]
    loaded = load(tmp_path, environ={name: text})
    assert getattr(loaded.settings, field) == expected
    assert getattr(loaded.settings, field) != getattr(Settings(home="", models_dir=""), field)
    assert loaded.sources[field] == f"environment {name}"


def test_every_flag_of_the_specification_has_its_variable():
    assert {option.flag for option in OPTIONS if option.flag and option.audience != "client"} == FLAGS
    assert all(option.env.startswith(("SKULK_", "HF_")) for option in OPTIONS)


def test_without_any_source_the_defaults_hold():
    loaded = resolve(flags={}, environ={"HOME": "/home/user"}, document={}, file="", folder="/")
    expected = Settings(home="/home/user/.local/share/skulk", models_dir="/home/user/.local/share/skulk/models")
    assert loaded.settings == expected
    assert set(loaded.sources.values()) == {"default"}
    assert set(loaded.sources) == set(Settings.__struct_fields__)
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("environ", "home"),
    [
        ({"HOME": "/home/user", "XDG_DATA_HOME": "/data"}, "/data/skulk"),
        ({"HOME": "/home/user", "XDG_DATA_HOME": "relative"}, "/home/user/.local/share/skulk"),
        ({"HOME": "/home/user", "XDG_DATA_HOME": "/data", "SKULK_HOME": "/s"}, "/s"),
        ({"HOME": "/home/user", "SKULK_HOME": "~/s"}, "/home/user/s"),
        ({"HOME": "/home/user", "SKULK_HOME": "here/../s"}, "/base/s"),
    ],
)
def test_the_home(environ: dict[str, str], home: str):
    settings = resolve(flags={}, environ=environ, document={}, file="", folder="/base").settings
    assert settings.home == home
    assert settings.models_dir == f"{home}/models"


@given(flag=st.booleans(), env=st.booleans(), toml=st.booleans())
def test_flags_before_environment_before_file_before_defaults(flag: bool, env: bool, toml: bool):
    loaded = resolve(
        flags={"api_port": "1001"} if flag else {},
        environ={"SKULK_API_PORT": "1002"} if env else {},
        document={"api_port": 1003} if toml else {},
        file="/h/skulk.toml",
        folder="/",
    )
    expected = [
        (flag, 1001, "flag --api-port"),
        (env, 1002, "environment SKULK_API_PORT"),
        (toml, 1003, "skulk.toml"),
        (True, 52415, "default"),
    ]
    _, port, source = next(row for row in expected if row[0])
    assert (loaded.settings.api_port, loaded.sources["api_port"]) == (port, source)


def test_the_file_takes_toml_types_and_the_texts_of_the_environment(tmp_path: Path):
    settings = load(
        tmp_path,
        toml="""
            api_port = 9000
            local = true
            no_mdns = true
            memory_limit = "24GiB"
            max_body = 1048576
            idle_ttl = 2.5
            llama_cpp_backends = ["vulkan", "cpu"]
            bootstrap_peers = "a,b:1"
            models_path = ["near", "/far,away"]
            llama_cpp_gpu_layers = "all"
            node_participation = "management"
        """,
    ).settings
    assert (settings.api_port, settings.local, settings.mdns, settings.idle_ttl_s) == (9000, True, False, 2.5)
    assert (settings.memory_limit_bytes, settings.max_body_bytes) == (24 * 2**30, 2**20)
    assert settings.backends == ("vulkan", "cpu")
    assert settings.bootstrap_peers == ("a:52416", "b:1")
    assert settings.models_path == (str(tmp_path / "home" / "near"), "/far,away")
    assert (settings.gpu_layers, settings.participation) == (-1, "management")


def test_config_names_another_file_which_may_move_the_home(tmp_path: Path):
    file = tmp_path / "other.toml"
    file.write_text('home = "moved"\ncluster = "attic"\n')
    loaded = load_settings(environ={"HOME": "/nowhere"}, config="other.toml", folder=str(tmp_path))
    assert loaded.settings.home == str(tmp_path / "moved")
    assert loaded.sources["cluster"] == str(file)


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            {"flags": {"api_port": "abc"}},
            "flag --api-port: 'abc' isn't accepted; give a port from 1 to 65535, or 0 for a free one.",
        ),
        (
            {"environ": {"SKULK_MEMORY_LIMIT": "plenty"}},
            "environment SKULK_MEMORY_LIMIT: 'plenty' isn't accepted; give a size such as 24GiB, 512MiB or 1073741824.",
        ),
        ({"toml": 'log_format = "xml"'}, "skulk.toml: log_format: 'xml' isn't accepted; give text or json."),
        ({"toml": "api_port = true"}, "skulk.toml: api_port: 'true' isn't accepted"),
        ({"toml": "api_port = [1]"}, "api_port: a list isn't accepted; give a port"),
        ({"toml": "[api_port]\nx = 1"}, "api_port: a dict isn't accepted; give a port"),
        ({"toml": "api_prt = 1"}, "api_prt is no setting of Skulk (did you mean api_port?); `skulk config` lists them"),
        ({"toml": "zzzzzz = 1"}, "zzzzzz is no setting of Skulk; `skulk config` lists them all."),
        ({"toml": "api_port = "}, "is no valid TOML"),
        ({"toml": 'home = "/elsewhere"'}, "home can't be moved by the file that lies in it"),
        (
            {"environ": {"SKULK_API_PORT": "7", "SKULK_NATS_PORT": "7"}},
            "api_port (environment SKULK_API_PORT) and nats_port",
        ),
        ({"environ": {"SKULK_LOCAL": "1", "SKULK_API_HOST": "0.0.0.0"}}, "keeps everything on loopback"),
        ({"config": "/nowhere/skulk.toml"}, "/nowhere/skulk.toml doesn't exist"),
    ],
)
def test_what_is_refused_names_source_value_and_what_is_accepted(sources: Any, sentence: str, tmp_path: Path):
    assert sentence in refusal(tmp_path, **sources)


def test_a_secret_is_not_told_even_when_it_is_refused(tmp_path: Path):
    assert "hush" not in refusal(tmp_path, environ={"SKULK_CLUSTER_TOKEN": "hush\nhush"})
    assert "hush" not in refusal(tmp_path, environ={"SKULK_NATS_URL": "http://me:hush@box"})


def test_a_file_that_cannot_be_read_or_is_none(tmp_path: Path):
    (tmp_path / "home" / "skulk.toml").mkdir(parents=True)
    assert re.search(r"skulk.toml can't be read: Is a directory\. Make it a file", refusal(tmp_path))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "is no valid TOML" in refusal(tmp_path, config=str(tmp_path / "bytes.toml"))
    (tmp_path / "big.toml").write_text("#" * (1024 * 1024 + 1))
    assert "larger than 1 MiB" in refusal(tmp_path, config=str(tmp_path / "big.toml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path):
    (tmp_path / "secret.toml").touch(mode=0)
    assert "Permission denied" in refusal(tmp_path, config=str(tmp_path / "secret.toml"))


def test_warnings(tmp_path: Path):
    loaded = load(
        tmp_path,
        environ={
            "SKULK_API_PROT": "1",
            "SKULK_XYZZY": "1",
            "SKULK_LLAMA_CPP_LOGITS_ALL": "1",
            "SKULK_LOCAL": "1",
            "SKULK_BOOTSTRAP_PEERS": "a",
        },
    )
    assert loaded.warnings == (
        "SKULK_API_PROT is no variable that this version knows (did you mean SKULK_API_PORT?); it has no effect.",
        "SKULK_XYZZY is no variable that this version knows; it has no effect.",
        "environment SKULK_LLAMA_CPP_LOGITS_ALL: llama_cpp_logits_all has no effect: logprobs are not served yet.",
        "environment SKULK_BOOTSTRAP_PEERS: a:52416 won't be met: local keeps everything on loopback.",
    )
    assert (
        load(tmp_path, environ={"SKULK_LLAMA_CPP_LOGITS_ALL": "0", "SKULK_API_PORT": "", "SKULK_X": ""}).warnings == ()
    )
    assert load(tmp_path, environ={READY_FD: "7"}).warnings == ()


def test_local_means_loopback_and_no_discovery(tmp_path: Path):
    loaded = load(tmp_path, flags={"local": "1"})
    assert (loaded.settings.api_host, loaded.settings.mdns) == ("127.0.0.1", False)
    assert loaded.sources["api_host"] == loaded.sources["mdns"] == "implied by local"
    assert load(tmp_path, flags={"local": "1", "api_host": "::1"}).settings.api_host == "::1"


def test_an_empty_variable_is_one_that_is_not_set(tmp_path: Path):
    loaded = load(tmp_path, environ={"SKULK_API_PORT": " ", "SKULK_API_KEYS": ""}, toml="api_port = 9000")
    assert (loaded.settings.api_port, loaded.sources["api_port"]) == (9000, "skulk.toml")
    assert loaded.sources["api_keys"] == "default"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback(host: str, expected: bool):
    assert is_loopback(host) is expected


def test_settings_written_as_toml_load_to_the_same(tmp_path: Path):
    environ = {name: text for name, (text, _, _) in ENVIRONMENT.items() if name != "SKULK_HOME"}
    settings = load(tmp_path, environ=environ).settings
    settings = msgspec.structs.replace(settings, models_path=("/a,b:c", '/"q"\\é😀'))
    file = tmp_path / "written.toml"
    file.write_text(toml_of(settings, Settings.__struct_fields__))
    assert load_settings(environ={}, config=str(file)).settings == settings
