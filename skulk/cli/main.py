"""``skulk``: reads the command line, loads the settings, runs one command, turns failures into one line and a status.

0  done      1  failed      2  wrong usage, or a setting that isn't accepted      75  a port or a lock is taken
130, 143  ended by Ctrl-C or SIGTERM      141  the reader of our output is gone
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Final

from skulk import __version__
from skulk.cli.commands import COMMANDS, add_settings
from skulk.cli.context import Context, note
from skulk.errors import SkulkError
from skulk.settings_load import load_settings
from skulk.settings_options import OPTIONS
from skulk.settings_values import Raw

WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
# Programs of the launcher, not of people: they read their instruction from stdin.
CHILDREN: Final = {
    "_gateway": "skulk.gateway.process",
    "_runner": "skulk.runner.process",
    "_hub": "skulk.node.hub_process",
    "_files": "skulk.node.files_process",
    "_header": "skulk.node.header_process",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="skulk",
        description="One LLM cluster out of the unlike machines of a home or an office.",
        epilog="`skulk COMMAND --help` tells the arguments of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"skulk {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        child = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            allow_abbrev=False,
        )
        command.arguments(child)
        add_settings(child, audience="any")
        child.add_argument("--config", metavar="FILE", help="settings file (default: skulk.toml in the home)")
        if command.talks:
            add_settings(child, audience="client")
        if command.talks or command.lists:
            child.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
        child.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in CHILDREN:
        return import_module(CHILDREN[argv[0]]).main()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets a stand-in for it, not a traceback.
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    if any(not argument.isascii() and _is_broken(argument) for argument in argv):
        note("an argument is no UTF-8 text; write it in the terminal's own encoding, UTF-8")
        return WRONG_USAGE
    arguments = build_parser().parse_args(argv)
    try:
        status = arguments.run(_context(arguments, os.environ if environ is None else environ))
        sys.stdout.flush()
    except SkulkError as error:
        note(error.detail)
        status = error.exit_status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # What is still buffered must not fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    return status


def _is_broken(argument: str) -> bool:
    """Whether bytes that are no text stand in an argument (Python keeps them as surrogates)."""
    return any("\ud800" <= letter <= "\udfff" for letter in argument)


def _context(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Context:
    given = vars(arguments)
    flags: dict[str, Raw] = {}
    for option in OPTIONS:
        value = given.get(option.field) if option.flag else None
        if value is not None:
            flags[option.field] = ",".join(value) if option.parser.is_list else value
    loaded = load_settings(environ=environ, flags=flags, config=given["config"])
    for warning in loaded.warnings:
        note(warning)
    return Context(arguments=arguments, loaded=loaded, environ=environ, is_json=bool(given.get("is_json")))
