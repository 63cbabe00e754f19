"""Where settings come from: flags > environment ``SKULK_*`` > ``skulk.toml`` > defaults, each value with its source.

The environment is an argument and is read here only; `resolve` is pure, `load_settings` adds the one file. A wrong
value is refused with its source, itself, and what is accepted; a name nobody knows is refused in the file (it is ours
alone) and warned of in the environment (a newer or an older version may know it).
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import msgspec

from skulk.errors import StartError
from skulk.settings import Settings
from skulk.settings_options import BY_ENV, BY_FIELD, BY_KEY, OPTIONS, Option, without_credentials
from skulk.settings_values import Raw

CONFIG_NAME: Final = "skulk.toml"
DEFAULT: Final = "default"
# How a parent tells a child of ours where to announce its readiness; no setting.
INTERNAL_VARIABLES: Final = ("SKULK_READY_FD",)
_IMPLIED_BY_LOCAL: Final = "implied by local"
_FOLDERS: Final = ("home", "models_dir", "hf_home", "tls_cert", "tls_key", "tls_ca")
_PORTS: Final = ("api_port", "nats_port", "route_port", "files_port")
_MAX_FILE_BYTES: Final = 1024 * 1024


class LoadedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings and where each came from.

    Attributes:
        sources: by field: ``flag --api-port``, ``environment SKULK_API_PORT``, ``skulk.toml`` (or the path that
            ``--config`` named), ``implied by local`` or ``default``.
        warnings: one line each, for stderr.
    """

    settings: Settings
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()


class _Given(msgspec.Struct, frozen=True, kw_only=True):
    """A value that somebody gave, still raw. ``folder``: what a relative path is relative to."""

    option: Option
    raw: Raw
    source: str
    folder: str


def load_settings(
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, Raw] | None = None,
    config: str | None = None,
    folder: str | None = None,
) -> LoadedSettings:
    """Reads ``skulk.toml`` and resolves all sources.

    Args:
        environ: the environment, usually ``os.environ``.
        flags: by field, the raw text of a flag that was given.
        config: path from ``--config``; None: ``skulk.toml`` in the home, where there is one.
        folder: what relative paths are relative to; None: the working directory.

    Raises:
        StartError: ``config_invalid``: a value or a key that isn't accepted, or a file that can't be read.
    """
    flags = flags or {}
    folder = folder or os.getcwd()
    if config is not None:
        path = _absolute(config, folder, environ)
        document = _read_document(path, required=True)
        return resolve(flags=flags, environ=environ, document=document, file=path, folder=folder)
    home = resolve(flags=flags, environ=environ, document={}, file="", folder=folder, only="home").settings.home
    path = os.path.join(home, CONFIG_NAME)
    document = _read_document(path, required=False)
    if "home" in document:
        raise _invalid(
            f"{path}: home can't be moved by the file that lies in it; set SKULK_HOME or give --home or --config."
        )
    return resolve(flags=flags, environ=environ, document=document, file=path, folder=folder)


def resolve(
    *,
    flags: Mapping[str, Raw],
    environ: Mapping[str, str],
    document: Mapping[str, object],
    file: str,
    folder: str,
    only: str = "",
) -> LoadedSettings:
    """The settings from what the sources hold; no I/O.

    Args:
        flags: by field, the raw text of a flag that was given.
        environ: the environment.
        document: the parsed ``skulk.toml``.
        file: its path.
        folder: what relative paths of flags and environment are relative to; those of the file are to its folder.
        only: if not empty, no other field is looked at (the home is needed before the file is found).

    Raises:
        StartError: ``config_invalid``.
    """
    given = {
        **_from_document(document, file),
        **_from_environ(environ, folder),
        **_from_flags(flags, folder),
    }
    if only:
        given = {field: one for field, one in given.items() if field == only}
    values = {field: _parsed(one, environ) for field, one in given.items()}
    sources = {option.field: DEFAULT for option in OPTIONS} | {field: one.source for field, one in given.items()}
    values.setdefault("home", _default_home(environ))
    values.setdefault("models_dir", os.path.join(values["home"], "models"))
    if values.get("local"):
        _keep_local(values, sources)
    settings = Settings(**values)
    if only:
        return LoadedSettings(settings=settings, sources=sources)
    _check_ports(settings, sources)
    warnings = (*_unknown_variables(environ), *_without_effect(settings, sources))
    return LoadedSettings(settings=settings, sources=sources, warnings=warnings)


def _from_flags(flags: Mapping[str, Raw], folder: str) -> dict[str, _Given]:
    return {
        field: _Given(option=BY_FIELD[field], raw=raw, source=f"flag {BY_FIELD[field].flag}", folder=folder)
        for field, raw in flags.items()
    }


def _from_environ(environ: Mapping[str, str], folder: str) -> dict[str, _Given]:
    """An empty variable is one that isn't set, as compose files and unit files write it."""
    return {
        option.field: _Given(option=option, raw=environ[name], source=f"environment {name}", folder=folder)
        for name, option in BY_ENV.items()
        if environ.get(name, "").strip()
    }


def _from_document(document: Mapping[str, object], file: str) -> dict[str, _Given]:
    folder = os.path.dirname(file)
    source = CONFIG_NAME if os.path.basename(file) == CONFIG_NAME else file
    given: dict[str, _Given] = {}
    for key, value in document.items():
        option = BY_KEY.get(key)
        if option is None:
            raise _invalid(
                f"{file}: {key} is no setting of Skulk{_nearest(key, BY_KEY)}; `skulk config` lists them all."
            )
        given[option.field] = _Given(option=option, raw=_raw_of(value, option, file), source=source, folder=folder)
    return given


def _raw_of(value: object, option: Option, file: str) -> Raw:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in cast("list[object]", value)):
        return cast("list[str]", value)
    kind = type(cast("object", value)).__name__
    raise _invalid(f"{file}: {option.key}: a {kind} isn't accepted; give {option.parser.accepts}.")


def _parsed(given: _Given, environ: Mapping[str, str]) -> Any:
    option = given.option
    try:
        value = option.parser.parse(given.raw)
    except ValueError as error:
        raw = given.raw if isinstance(given.raw, str) else ", ".join(given.raw)
        shown = "its value" if option.secret else repr(without_credentials(raw[:200]))
        named = given.source.startswith(("flag ", "environment "))
        source = given.source if named else f"{given.source}: {option.key}"
        raise _invalid(f"{source}: {shown} isn't accepted; give {option.parser.accepts}.") from error
    if option.field in _FOLDERS:
        assert isinstance(value, str)
        return _absolute(value, given.folder, environ) if value else ""
    if option.field == "models_path":
        return tuple(_absolute(path, given.folder, environ) for path in cast("tuple[str, ...]", value))
    return value


def _absolute(path: str, folder: str, environ: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        path = os.path.join(_user_home(environ), path[2:])
    return os.path.normpath(os.path.join(folder, path))


def _user_home(environ: Mapping[str, str]) -> str:
    return environ.get("HOME") or os.path.expanduser("~")


def _default_home(environ: Mapping[str, str]) -> str:
    """``$XDG_DATA_HOME/skulk``; a relative ``XDG_DATA_HOME`` is to be ignored, says its specification."""
    base = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(_user_home(environ), ".local", "share")
    return os.path.normpath(os.path.join(base, "skulk"))


def _keep_local(values: dict[str, Any], sources: dict[str, str]) -> None:
    """``local`` turns off what reaches beyond loopback, and refuses what was asked to reach beyond it."""
    if "api_host" not in values:
        values["api_host"], sources["api_host"] = "127.0.0.1", _IMPLIED_BY_LOCAL
    elif not is_loopback(values["api_host"]):
        raise _invalid(
            f"api_host is {values['api_host']!r} ({sources['api_host']}), but local ({sources['local']}) keeps "
            "everything on loopback; leave one of the two out."
        )
    if values.get("mdns", True):
        values["mdns"], sources["mdns"] = False, _IMPLIED_BY_LOCAL


def is_loopback(host: str) -> bool:
    """Whether a listener on this address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_ports(settings: Settings, sources: Mapping[str, str]) -> None:
    taken: dict[int, str] = {}
    for field in _PORTS:
        port = getattr(settings, field)
        if port and port in taken:
            other = taken[port]
            raise _invalid(
                f"{other} ({sources[other]}) and {field} ({sources[field]}) are both {port}; give each its own port, "
                "or 0 for a free one."
            )
        taken[port] = field


def _unknown_variables(environ: Mapping[str, str]) -> Iterable[str]:
    for name in sorted(environ):
        if name.startswith("SKULK_") and name not in BY_ENV and name not in INTERNAL_VARIABLES and environ[name]:
            yield f"{name} is no variable that this version knows{_nearest(name, BY_ENV)}; it has no effect."


def _without_effect(settings: Settings, sources: Mapping[str, str]) -> Iterable[str]:
    for option in OPTIONS:
        if option.unserved and sources[option.field] != DEFAULT and _is_changed(settings, option.field):
            yield f"{sources[option.field]}: {option.key} has no effect: {option.unserved}."
    beyond = [peer for peer in settings.bootstrap_peers if not is_loopback(peer.rpartition(":")[0].strip("[]"))]
    if settings.local and beyond:
        yield f"{sources['bootstrap_peers']}: {', '.join(beyond)} won't be met: local keeps everything on loopback."
    if settings.nats_url and settings.bootstrap_peers:
        yield f"{sources['bootstrap_peers']}: bootstrap_peers has no effect: nodes meet on the bus of nats_url."
    if settings.events_stream and not settings.nats_url:
        yield f"{sources['events_stream']}: no effect without nats_url: a node's own bus has no JetStream."


def _is_changed(settings: Settings, field: str) -> bool:
    return getattr(settings, field) != getattr(Settings(home="", models_dir=""), field)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {found[0]}?)" if found else ""


def _read_document(path: str, *, required: bool) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            body = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        if not required:
            return {}
        raise _invalid(f"{path} doesn't exist; --config names a file such as {CONFIG_NAME}.") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise _invalid(
            f"{path} can't be read: {reason}. Make it a file that this user may read, or name another with --config."
        ) from error
    if len(body) > _MAX_FILE_BYTES:
        raise _invalid(f"{path} is larger than 1 MiB; that is no settings file.")
    try:
        return tomllib.loads(body.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(f"{path} is no valid TOML: {error}.") from error


def _invalid(sentence: str) -> StartError:
    return StartError("config_invalid", sentence)


def toml_of(settings: Settings, fields: Iterable[str]) -> str:
    """Fields as a ``skulk.toml`` that loads to the same values; secrets stand in it, so mind its permissions."""
    lines: list[str] = []
    for field in fields:
        option, value = BY_FIELD[field], getattr(settings, field)
        if value in ("", ()):
            continue
        text = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else option.parser.show(value)
        lines.append(f"{option.key} = {json.dumps(text, ensure_ascii=False)}\n")
    return "".join(lines)
