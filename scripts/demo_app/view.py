"""The output of the demonstration: live on a terminal, in plain lines elsewhere, with a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .record import Proxy, Record, median, percentile, short

WIRE = "on the wire"
"""The subject of lines that the demonstration saw on the network itself."""
COLUMN = len(WIRE)


class View(Protocol):
    """What the rest of the demonstration needs of it."""

    def line(self, who: str, what: str, *, bad: bool = False) -> None:
        """Show one event; `bad` if it should not happen in a demonstration."""
        ...

    def text(self, text: str) -> None:
        """Show text as it is."""
        ...

    def progress(self, record: Record, left: float | None) -> None:
        """Show the counts so far and the seconds left (None: not begun); called a few times a second."""
        ...


@contextmanager
def chosen(console: Console) -> Iterator[View]:
    """The view that suits where the output goes."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield _LiveView(live)
    else:
        yield _PlainView()


class _PlainView:
    _EVERY = 5.0

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = 0.0

    def line(self, who: str, what: str, *, bad: bool = False) -> None:
        print(f"{_since(self._start)}  {who:{COLUMN}}  {'! ' if bad else ''}{what}", flush=True)

    def text(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, record: Record, left: float | None) -> None:
        now = time.monotonic()
        if left and now - self._shown >= self._EVERY:
            self._shown = now
            self.line("requests", _counts(record, left))


class _LiveView:
    """The lines scroll by above the table, which stays in place."""

    def __init__(self, live: Live) -> None:
        self._start = time.monotonic()
        self._live = live

    def line(self, who: str, what: str, *, bad: bool = False) -> None:
        style = "bold red" if bad else "green" if who == WIRE else ""
        self._live.console.print(
            Text.assemble((f"{_since(self._start)}  ", "dim"), (f"{who:{COLUMN}}  ", "bold"), (what, style))
        )

    def text(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def progress(self, record: Record, left: float | None) -> None:
        counts = "starting" if left is None else _counts(record, left)
        self._live.update(Group(table(record), Text(f"{counts}; Ctrl-C ends it", style="bold")), refresh=True)


def _since(start: float) -> str:
    return f"{time.monotonic() - start:5.1f} s"


def _counts(record: Record, left: float) -> str:
    requests = record.requests
    rest = f"{left:.0f} s to go" if left else "done"
    return f"{len(requests.took_ms)} good, {len(requests.failures)} failed; {rest}"


def table(record: Record) -> RenderableType:
    """The two Envoys side by side, and the requests under them."""
    envoys = Table()
    envoys.add_column("")
    rows: list[list[str]] = [[label] for label in _LABELS]
    for proxy in record.envoys.values():
        envoys.add_column(proxy.title, overflow="fold")
        for row, cell in zip(rows, _cells(proxy), strict=True):
            row.append(cell)
    for row in rows:
        envoys.add_row(*row)
    return Group(envoys, _requests(record))


_LABELS = (
    "identity",
    "certificates on the wire",
    "rotations",
    "pushes",
    "accepted / rejected",
    "time to accept",
)


def _cells(proxy: Proxy) -> tuple[str, ...]:
    return (
        proxy.identity,
        " ".join(short(serial) for serial in proxy.serials) or "none yet",
        str(proxy.rotations),
        str(proxy.pushed),
        f"{len(proxy.ack_ms)} / {proxy.nacked}",
        f"median {median(proxy.ack_ms):.1f} ms, longest {max(proxy.ack_ms, default=0.0):.1f} ms",
    )


def _requests(record: Record) -> Table:
    times = record.requests.took_ms
    requests = Table()
    for title in ("requests", "good", "failed", "median", "99.9 %", "longest"):
        requests.add_column(title, justify="right")
    failed = len(record.requests.failures)
    requests.add_row(
        str(len(times) + failed),
        str(len(times)),
        Text(str(failed), style="bold red" if failed else ""),
        *(f"{value:.1f} ms" for value in (median(times), percentile(times, 0.999), max(times, default=0.0))),
    )
    return requests
