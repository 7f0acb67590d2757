"""Start everything, observe it for a while, report how it went."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
from rich.console import Console

from . import files, view, words
from .children import DemoError
from .play import COMMAND, Options, play
from .record import ROTATIONS, Proxy, Record

WIDTH = 120
"""Columns of the table where there is no terminal to ask."""


def main() -> int:
    """Exit 0 if all happened that should, 1 if not, 130 if stopped before the end."""
    options = _options()
    record = Record(
        {
            "envoy-a": Proxy("Envoy A (client side)", files.WEB),
            "envoy-b": Proxy("Envoy B (server side)", files.BACKEND),
        }
    )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        print(words.before(options.ttl, options.seconds, options.rotations), flush=True)
        finished = _watched(options, record, console)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader has ended (`| head`); the interpreter must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    console.print(view.table(record))
    if not finished:
        console.print("Stopped before the end.")
        return 130
    code = _verdict(console, record.shortfalls(options.rotations))
    if code == 0:
        print(f"\n{words.after(COMMAND)}", end="")
    return code


def _options() -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Two real Envoys speak mutual TLS with identities that sds-agent issued and renews.",
    )
    parser.add_argument("--seconds", type=int, default=45, help="how long to send requests (default: %(default)s)")
    parser.add_argument(
        "--ttl", type=int, default=20, help="the life of a certificate in seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--rotations",
        type=int,
        default=ROTATIONS,
        help="how often Envoy B's certificate has to change on the wire (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave everything running afterwards, until Ctrl-C, for a try by hand"
    )
    given = parser.parse_args()
    return Options(seconds=given.seconds, ttl=given.ttl, rotations=given.rotations, keep=given.keep)


def _watched(options: Options, record: Record, console: Console) -> bool:
    """Play it and show it; returns whether it ran its whole time. Raises DemoError."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="sds-agent-demo-") as directory,
            view.chosen(console) as shown,
        ):
            return anyio.run(_until_signalled, options, files.Places(Path(directory)), record, shown)
    except BaseExceptionGroup as group:
        # one cause can end several tasks at once; the first one names it
        raise next(_leaves(group)) from None


async def _until_signalled(options: Options, places: files.Places, record: Record, shown: view.View) -> bool:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_on_signal, tasks.cancel_scope)
        await play(options, places, record, shown)
        tasks.cancel_scope.cancel()
    return record.complete


async def _cancel_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _verdict(console: Console, shortfalls: list[str]) -> int:
    for sentence in shortfalls:
        console.print(sentence, style="bold red")
    if not shortfalls:
        console.print("No request failed while the certificates changed.", style="bold green")
    return 1 if shortfalls else 0
