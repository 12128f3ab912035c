"""One progress bar for every long loop: a live bar on a terminal, a line every few seconds elsewhere.

Everything goes to stderr, so that stdout stays data. The bar shows the share done, the rate and the time left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_SECONDS = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "it")
        return Text(f"{_short(speed)} {unit}/s" if speed else f"– {unit}/s", style="cyan")


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


class Bar:
    """Handle of one running bar: `advance(n)` counts, `note(text)` sets the words at its end."""

    def __init__(self, title: str, total: float, unit: str, done: float, live: Progress | None) -> None:
        self._title, self._total, self._unit, self._live = title, total, unit, live
        self._done = self._first = done
        self._note = ""
        self._start = self._last = time.monotonic()
        self._task = (
            live.add_task(title, total=total, completed=int(done), unit=unit, note="") if live else None
        )

    def advance(self, n: float = 1) -> None:
        self._done += n
        if self._live is not None and self._task is not None:
            self._live.advance(self._task, n)
        elif time.monotonic() - self._last >= LINE_EVERY_SECONDS:
            self._print()

    def note(self, text: str) -> None:
        self._note = text
        if self._live is not None and self._task is not None:
            self._live.update(self._task, note=text)

    def _print(self) -> None:
        self._last = time.monotonic()
        rate = (self._done - self._first) / max(self._last - self._start, 1e-9)
        left = f"{(self._total - self._done) / rate:,.0f} s left" if rate > 0 else "starting"
        share = self._done / self._total if self._total else 1.0
        line = f"{self._title}: {share:4.0%}  {_short(rate)} {self._unit}/s  {left}  {self._note}"
        print(line.rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: float, *, unit: str = "it", done: float = 0) -> Iterator[Bar]:
    """Show progress of a loop over `total` units, `done` of which an earlier run finished."""
    if not sys.stderr.isatty():
        bar = Bar(title, total, unit, done, None)
        yield bar
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as live:
        yield Bar(title, total, unit, done, live)
