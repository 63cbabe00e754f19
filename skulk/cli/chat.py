"""``skulk chat PROMPT``: one answer, from the running cluster or from a private node that ends with the command."""

from __future__ import annotations

import sys
from typing import Final

import msgspec

from skulk.cli.asking import LIMIT, Answer, ask
from skulk.cli.client import ApiClient, connect
from skulk.cli.context import Context, note, print_json, printable_stream
from skulk.cli.interruptible import run_interruptible
from skulk.cli.models import list_models
from skulk.cli.node_file import has_running_node
from skulk.cli.placing import ensure_ready, wait_for_instance, wait_ready
from skulk.cli.private_cluster import private_cluster
from skulk.errors import SkulkError
from skulk.models.catalogue import EMBEDDED_MODEL

PROGRAM: Final = (sys.executable, "-m", "skulk")
PLACE_WAIT_S: Final = 60.0


def run(context: Context) -> int:
    """Prints the answer as it comes."""
    return run_interruptible(_chat(context))


async def _chat(context: Context) -> int:
    try:
        async with connect(context.settings) as client:
            model_id = context.arguments.model or await _usual_model(client)
            await ensure_ready(client, model_id, _say(context))
            return await _answer(context, client, model_id)
    except SkulkError as error:
        # A cluster that was named, or a node that runs, must answer; only where there is none we make one.
        if error.code != "cluster_not_reached" or context.settings.api_url or has_running_node(context.settings.home):
            raise
    return await _chat_privately(context)


async def _chat_privately(context: Context) -> int:
    settings = context.settings
    model_id = context.arguments.model or EMBEDDED_MODEL
    note(f"no cluster is running; starting a private node for {model_id} (`skulk up` starts one that stays)")
    async with (
        private_cluster(settings, context.environ, model_id, PROGRAM) as url,
        ApiClient(url) as client,
    ):
        instances = await wait_for_instance(client, model_id, timeout_s=PLACE_WAIT_S)
        await wait_ready(client, instances, _say(context))
        return await _answer(context, client, model_id)


async def _usual_model(client: ApiClient) -> str:
    """A model that is ready, the readiest first; where none is, the embedded one."""
    return next((model.id for model in await list_models(client) if model.state == "ready"), EMBEDDED_MODEL)


async def _answer(context: Context, client: ApiClient, model_id: str) -> int:
    if context.is_json:
        answer = await ask(client, model_id, context.arguments.prompt, lambda _: None)
        print_json(msgspec.to_builtins(answer))
    else:
        answer = await ask_aloud(client, model_id, context.arguments.prompt)
    if answer.finish_reason == "length":
        note("the answer was cut off: it reached the window of the instance, or what this command waits for")
    return 0


async def ask_aloud(client: ApiClient, model_id: str, prompt: str, *, limit: int = LIMIT) -> Answer:
    """Asks and writes each piece to stdout as it comes; a terminal gets no control characters from a model.

    Raises:
        SkulkError: as `ask`; what came until then stands on its own line.
    """
    is_terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        sys.stdout.write(printable_stream(piece) if is_terminal else piece)
        sys.stdout.flush()

    wrote: list[str] = []
    try:
        return await ask(client, model_id, prompt, lambda piece: (wrote.append(piece), write(piece)), limit=limit)
    finally:
        if wrote and not wrote[-1].endswith("\n"):
            write("\n")


def _say(context: Context) -> SayAside:
    return SayAside(is_quiet=context.is_json or not sys.stderr.isatty())


class SayAside(msgspec.Struct, frozen=True, kw_only=True):
    """Progress for people who watch; scripts get only the answer and errors."""

    is_quiet: bool

    def __call__(self, sentence: str) -> None:
        if not self.is_quiet:
            note(sentence)
