"""Exact activation patching: I(n) = L(clean run with n ← its noise value) − L(clean run), for any set of nodes.

A row of a batch is a clean run with some nodes patched. Cached: rows with nodes in layers ≥ l and at positions ≥ t run
from layer l and position t on, on the clean run's stream, keys and values; the rest cannot have changed. Nodes before
the first differing token, and past the last position that the metric reads, have effect exactly 0. Uncached is the
plain way, a forward pass of the whole model a row; both give the same numbers to float error.

A run over all nodes writes a Parquet part every few seconds, and goes on after the parts that it finds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache.errors import DataError
from cache.hooks import Edit
from cache.progress import progress
from cache.workspace import atomic_file, canonical_json, read_json, write_json
from probes.attribution.atp import AtPStar, NodeScores
from probes.attribution.case import Case
from probes.attribution.metric import Target
from probes.attribution.nodes import Block, NodeSpace
from probes.attribution.pairs import PromptPair, TokenPair

PART_SECONDS = 10.0
RECORD = "patching.json"


class ExactPatching:
    """Patched runs of one pair, in the node space of an `AtPStar`.

    batch: rows of a patched pass. cached=False runs the whole model for each row.
    """

    def __init__(self, attribution: AtPStar, pair: PromptPair | TokenPair | Target, *, cached: bool = True, batch: int = 32) -> None:  # fmt: skip
        self.model, self.metric = attribution.model, attribution.metric
        target = pair if isinstance(pair, Target) else attribution.targets(pair)[0]
        self.space: NodeSpace = attribution.space([target])
        self.cached, self.batch = cached, max(1, batch)
        with torch.no_grad():
            self.case: Case = attribution.case(self.space, [target])
        self.target = self.case.targets[0]
        self.positions = self.target.positions
        # A splice counts positions from the start of what it gets, so a spliced run is never cut there.
        self.prefix = cached and self.case.clean.has_prefix and (not attribution.saes or attribution.error)
        self.clean_value = self.case.baseline()
        self.rows_run = 0
        """Patched runs so far: forward-equivalents of an uncached run."""
        self._changes: dict[int, Tensor] = {}
        self._clean_logits: Tensor | None = None

    # ------------------------------------------------------------------ effects

    def live(self, ids: np.ndarray) -> np.ndarray:
        """Which nodes can have an effect at all, bool."""
        block, pos, index = self.space.locate(ids)
        if self.space.summed:
            live = np.ones(len(ids), dtype=bool)
        else:
            live = (pos >= self.target.pair.first_difference) & (pos <= max(self.positions))
        for number in np.unique(block):
            if self.space.blocks[number].kind == "sae":
                moved = self._change(int(number)).abs().amax(0) if self.space.summed else None
                here = block == number
                table = self._change(int(number))
                value = moved[index[here]] if moved is not None else table[pos[here], index[here]]
                live[here] &= (value != 0).cpu().numpy()
        return live

    def effects(self, ids: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """I(n) of single nodes, float64 in the order of `ids` (default: all)."""
        ids = np.arange(len(self.space)) if ids is None else np.asarray(ids, dtype=np.int64)
        out = np.zeros(len(ids))
        with progress("exact patching", len(ids), unit="node") as bar:
            for where in self._chunks(ids):
                out[where] = self.patched([ids[i : i + 1] for i in where])
                bar.advance(len(where))
        return out

    def _chunks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Places in `ids`, layer by layer and position by position, those without any effect left out; uncached, all
        of them as they come."""
        if not self.cached:
            yield from np.split(np.arange(len(ids)), range(self.batch, len(ids), self.batch))
            return
        where = np.flatnonzero(self.live(ids))
        block, pos, _ = self.space.locate(ids[where])
        layer = self.space.layers(block)
        order = np.lexsort((pos, layer))
        where, layer, pos = where[order], layer[order], pos[order]
        # A chunk starts at its first position, so one place a chunk; small ones of a layer are put together.
        chunk: list[np.ndarray] = []
        for group in np.split(np.arange(len(where)), np.flatnonzero(np.diff(layer) | np.diff(pos)) + 1):
            full = sum(map(len, chunk)) + len(group) > self.batch
            if chunk and (full or layer[group[0]] != layer[chunk[-1][0]]):
                yield where[np.concatenate(chunk)]
                chunk = []
            chunk.append(group)
            if len(group) > self.batch:
                yield from np.array_split(where[group], -(-len(group) // self.batch))
                chunk = []
        if chunk:
            yield where[np.concatenate(chunk)]

    @torch.no_grad()
    def patched(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """L(all nodes of a row patched together) − L(clean), for each row."""
        out = []
        for i in range(0, len(rows), self.batch):
            part = rows[i : i + self.batch]
            number = np.concatenate([np.full(len(r), j) for j, r in enumerate(part)]).astype(np.int64)
            ids = np.concatenate(part) if part else np.zeros(0, dtype=np.int64)
            out.append(self._patched(len(part), number, ids))
        return np.concatenate(out) if out else np.zeros(0)

    def _patched(self, n: int, row: np.ndarray, ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            return np.zeros(n)
        block, pos, index = self.space.locate(ids)
        layer = int(self.space.layers(block).min())
        start = int(pos.min()) if self.prefix and not self.space.summed else 0
        if start > max(self.positions):
            return np.zeros(n)
        edits: dict[str, list[tuple[Block, Tensor, Tensor, Tensor]]] = {}
        for number in np.unique(block):
            here = torch.from_numpy(np.flatnonzero(block == number))
            chosen = [torch.from_numpy(a)[here] for a in (row, pos, index)]
            edits.setdefault(self.space.blocks[number].hook, []).append((int(number), *chosen))  # type: ignore[arg-type]
        fns = {hook: self._edit(parts, start) for hook, parts in edits.items()}
        self.rows_run += n
        with self.case.spliced():
            logits = self._uncached(n, fns) if not self.cached else self._suffix(n, layer, start, fns)
        return (self.case.values(logits).double() - self.clean_value).cpu().numpy()

    def _uncached(self, n: int, edits: Mapping[str, Edit]) -> Tensor:
        with self.model.hooked(edits):
            return self.model(self.case.clean.tokens.expand(n, -1))[:, list(self.positions)]

    def _suffix(self, n: int, layer: int, start: int, edits: Mapping[str, Edit]) -> Tensor:
        clean = self.case.clean
        x = clean.inputs[layer][:, start:].expand(n, -1, -1)
        later = [p for p in self.positions if p >= start]
        logits = clean.run(x, layer, start, later, edits)
        if len(later) == len(self.positions):
            return logits
        if self._clean_logits is None:
            self._clean_logits = clean.run(clean.inputs[0], 0, 0, self.positions)
        earlier = [i for i, p in enumerate(self.positions) if p < start]
        return torch.cat([self._clean_logits[:, earlier].expand(n, -1, -1), logits], dim=1)

    def _change(self, number: int) -> Tensor:
        """[T, n] codes or [T, n, d] activations that patching a block adds."""
        if number not in self._changes:
            self._changes[number] = self.case.change(self.space.blocks[number])[0]
        return self._changes[number]

    def _edit(self, parts: Sequence[Any], start: int) -> Edit:
        def fn(x: Tensor) -> Tensor:
            x = x.clone()
            for number, row, pos, index in parts:
                self._add(x, self.space.blocks[number], self._change(number), row, pos - start, index, start)
            return x

        return fn

    def _add(self, x: Tensor, block: Block, change: Tensor, row: Tensor, pos: Tensor, index: Tensor, start: int) -> None:  # fmt: skip
        """Put the noise value of each (row, position, index) into x [R, T - start, d], in place.

        A feature and an error are parts of their hook's vector: their change is added to what is there.
        """
        if self.space.summed:
            t = len(change)
            row, index, pos = (
                row.repeat_interleave(t),
                index.repeat_interleave(t),
                torch.arange(t).repeat(len(row)),
            )
        if block.kind == "sae":
            rows = self.case.saes[block.hook].W_dec[index] * change[pos + start, index, None]
            x.index_put_((row, pos), rows.to(x.dtype), accumulate=True)
            return
        view = x.view(*x.shape[:2], block.n, -1)
        if block.kind == "sae_error":
            view.index_put_((row, pos, index), change[pos + start, index].to(x.dtype), accumulate=True)
            return
        # The value itself: nodes before it in the same set have moved what is there, and it must not count twice.
        noise = self.case.noise[block.hook][0].unflatten(-1, (block.n, -1))
        view.index_put_((row, pos, index), noise[pos + start, index].to(x.dtype))

    # ------------------------------------------------------------------ all nodes

    def run(self, folder: str | Path, ids: np.ndarray | None = None) -> np.ndarray:
        """Effects of all nodes (or `ids`), kept in `folder` as they are made: the same call goes on after a stop."""
        folder = Path(folder)
        ids = np.arange(len(self.space)) if ids is None else np.asarray(ids, dtype=np.int64)
        self._claim(folder, ids)
        out, known = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
        place = {int(n): i for i, n in enumerate(ids)}
        for file in sorted(folder.glob("part-*.parquet")):
            table = pq.read_table(file)
            at = [place.get(n, -1) for n in table["node"].to_pylist()]
            if -1 in at:
                raise DataError(f"{folder} holds the effects of other nodes: give a new folder")
            out[at], known[at] = table["effect"].to_numpy(), True
        pending: list[np.ndarray] = []
        last = time.monotonic()
        with progress("exact patching", len(ids), unit="node", done=int(known.sum())) as bar:
            for where in self._chunks(ids):
                todo = where[~known[where]]
                if len(todo):
                    out[todo] = self.patched([ids[i : i + 1] for i in todo])
                    pending.append(todo)
                    bar.advance(len(todo))
                if pending and time.monotonic() - last > PART_SECONDS:
                    self._write(folder, ids, out, pending)
                    pending, last = [], time.monotonic()
        if pending:
            self._write(folder, ids, out, pending)
        return out

    def _claim(self, folder: Path, ids: np.ndarray) -> None:
        key = {
            "model": self.model.identity, "space": self.space.signature(), "metric": self.metric.name,
            "clean": list(self.target.pair.clean), "noise": list(self.target.pair.noise), "nodes": len(ids),
            "answers": [list(a) for a in self.target.pair.answers], "wrong": [list(a) for a in self.target.pair.wrong],
            "saes": {hook: sae.sae_id for hook, sae in self.case.saes.items()}, "error": self.case.error,
        }  # fmt: skip
        record = folder / RECORD
        if record.exists():
            if canonical_json(read_json(record)) != canonical_json(key):
                raise DataError(
                    f"{folder} holds the effects of another pair, model or node set: give a new folder"
                )
            return
        write_json(record, key)

    def _write(self, folder: Path, ids: np.ndarray, out: np.ndarray, pending: list[np.ndarray]) -> None:
        where = np.concatenate(pending)
        number = len(list(folder.glob("part-*.parquet")))
        with atomic_file(folder / f"part-{number:05d}.parquet") as tmp:
            pq.write_table(pa.table({"node": ids[where], "effect": out[where]}), tmp)


def verify(
    attribution: AtPStar, scores: NodeScores, pairs: Any, top_k: int, *, cached: bool = True
) -> NodeScores:
    """The same scores with `exact` (mean effect) and `exact_abs` (mean |effect|) of the best `top_k` nodes, else NaN."""
    targets = attribution.targets(pairs)
    ids = scores.top(top_k)
    effects = np.stack([_in_space(attribution, t, scores.space, ids, cached) for t in targets])
    columns = dict(scores.columns)
    for name, value in (("exact", effects.mean(0)), ("exact_abs", np.abs(effects).mean(0))):
        columns[name] = np.full(len(scores.space), np.nan)
        columns[name][ids] = value
    return NodeScores(
        scores.space,
        scores.score,
        scores.signed,
        scores.n_pairs,
        scores.passes + len(ids),
        scores.method,
        columns,
    )


def _in_space(attribution: AtPStar, target: Target, space: NodeSpace, ids: np.ndarray, cached: bool) -> np.ndarray:  # fmt: skip
    """Effects of nodes of `space` on a pair whose own space may be shorter (only where positions are summed)."""
    exact = ExactPatching(attribution, target, cached=cached)
    if len(exact.space) != len(space):
        raise DataError(
            "the scores are of pairs of another length: verify them on the pairs they were made from"
        )
    return exact.effects(ids)
