"""Rows of metrics of a run: Parquet parts written together with the checkpoints they belong to, and who else listens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.workspace import atomic_file

Listener = Callable[[dict[str, Any]], None]
"""Called with each new row: sae (its place in the run), step, tokens, lr, rate, fvu, l0, n_dead ..."""


class MetricsLog:
    """In memory, and in `run`/metrics/part-<step>.parquet where there is a run folder."""

    def __init__(self, run: Path | None, listener: Listener | None = None) -> None:
        self._folder = run / "metrics" if run is not None else None
        self._listener = listener
        self.rows: list[dict[str, Any]] = []
        self._written = 0

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._listener is not None:
            self._listener(row)

    def keep_until(self, step: int) -> None:
        """Read the parts of an earlier start up to its checkpoint; later parts belong to steps that run again."""
        if self._folder is None:
            return
        for part in sorted(self._folder.glob("part-*.parquet")):
            if int(part.stem.removeprefix("part-")) > step:
                part.unlink()
            else:
                self.rows += pq.read_table(part).to_pylist()
        self._written = len(self.rows)

    def flush(self, step: int) -> None:
        new = self.rows[self._written :]
        if self._folder is None or not new:
            return
        with atomic_file(self._folder / f"part-{step:08d}.parquet") as tmp:
            pq.write_table(pa.Table.from_pylist(new), tmp)
        self._written = len(self.rows)
