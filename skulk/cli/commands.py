"""The table of commands. Each names its module, which is imported when it is used and offers ``add_arguments, run``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Final

import msgspec

from skulk.cli.context import Context
from skulk.settings_options import OPTIONS


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One command.

    Attributes:
        module: under `skulk.cli`; its ``run(context) -> int`` returns the exit status.
        help: one line for ``skulk --help``.
        talks: to a cluster: takes ``--api`` and ``--json``.
        lists: takes ``--json`` though it talks to no cluster.
        arguments: adds its own arguments.
    """

    name: str
    module: str
    help: str
    talks: bool = True
    lists: bool = False
    arguments: Callable[[argparse.ArgumentParser], object] = lambda _: None

    def run(self, context: Context) -> int:
        """Imports the module and runs the command."""
        return import_module(f"skulk.cli.{self.module}").run(context)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _up(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, audience="node")
    parser.add_argument("--greet", action="store_true", help="when started, let the model answer once on the terminal")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--forgive",
        metavar="BACKEND",
        type=_filled,
        help="first: take a backend out of quarantine, as llama_cpp-vulkan",
    )


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", type=_filled, help="model id (default: a ready one, else the embedded one)"
    )
    parser.add_argument("prompt", metavar="PROMPT", type=_filled, help="what to ask")


def _place(parser: argparse.ArgumentParser) -> None:
    _preview(parser)
    parser.add_argument(
        "--replicas", metavar="N", type=_positive, default=1, help="how many instances to add, all or none (default: 1)"
    )
    parser.add_argument("--explain", action="store_true", help="say of every node why it was taken or not")
    parser.add_argument("--wait", action="store_true", help="return when they are ready")


def _preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=_filled, help="model id")
    parser.add_argument(
        "--exclude",
        metavar="NODE",
        action="append",
        default=[],
        type=_filled,
        help="a node not to use, id or name (repeatable)",
    )
    parser.add_argument(
        "--context", metavar="N", type=_positive, help="window of one request, tokens (default: what fits)"
    )
    parser.add_argument("--force", action="store_true", help="also where the memory doesn't suffice by the estimate")


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instance", metavar="INSTANCE", type=_filled, help="its id, or how its id begins")


def _stored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=_filled, help="model id: org/repo, org/repo:QUANTIZATION, …")
    parser.add_argument("--node", metavar="NODE", type=_filled, help="on this node, id or name")


def _pull(parser: argparse.ArgumentParser) -> None:
    _stored(parser)
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--pin", action="store_true", help="keep it, whatever SKULK_MODELS_BUDGET says")
    keep.add_argument("--unpin", action="store_true", help="let it go when the budget needs its room")
    parser.add_argument("--detach", action="store_true", help="don't wait until it is here")


def _drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node", metavar="NODE", type=_filled, help="its id or name")
    parser.add_argument("--undo", action="store_true", help="let it take work again")


def _events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new events until Ctrl-C")


def _config(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, audience="node")


COMMANDS: Final = (
    Command(name="up", module="up", help="start a node and stay in the foreground", talks=False, arguments=_up),
    Command(name="chat", module="chat", help="ask a model; starts a private node if none runs", arguments=_chat),
    Command(name="place", module="place", help="add instances of a model", arguments=_place),
    Command(name="preview", module="preview", help="show where a model would go, and why", arguments=_preview),
    Command(name="ps", module="ps", help="list the instances"),
    Command(name="nodes", module="nodes", help="list the nodes"),
    Command(name="models", module="models", help="list the models"),
    Command(name="pull", module="pull", help="fetch a model's files to a node", arguments=_pull),
    Command(name="remove", module="remove", help="delete a model's files from nodes", arguments=_stored),
    Command(name="verify", module="verify", help="hash a model's files anew", arguments=_stored),
    Command(name="rm", module="rm", help="delete an instance", arguments=_rm),
    Command(name="drain", module="drain", help="take no new work to a node, move its instances", arguments=_drain),
    Command(name="events", module="events", help="show what the master decided", arguments=_events),
    Command(
        name="config",
        module="config",
        help="show the settings and their sources",
        talks=False,
        lists=True,
        arguments=_config,
    ),
    Command(name="doctor", module="doctor", help="check this machine", talks=False, lists=True, arguments=_doctor),
    Command(name="version", module="version", help="show the version", talks=False),
)


def add_settings(parser: argparse.ArgumentParser, *, audience: str) -> None:
    """The flags of settings for an audience; their texts are parsed with those of the other sources, not here."""
    for option in OPTIONS:
        if not option.flag or option.audience != audience:
            continue
        if option.flag_value:
            parser.add_argument(
                option.flag, dest=option.field, action="store_const", const=option.flag_value, help=option.help
            )
        else:
            action = "append" if option.parser.is_list else "store"
            parser.add_argument(option.flag, dest=option.field, action=action, metavar=option.metavar, help=option.help)
