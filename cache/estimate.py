"""What a harvest will need, before it runs: tokens, disk, peak memory and time, from a few probe batches.

disk      exact bytes of the vectors, the narrow columns of a sample of the token table compressed, and the records
memory    growth of the resident set while the two widest batches run and a few rows are written, plus what grows with
          a shard: two buffers of each hook (one is filled while the other is written), the writer's sums, one row
          group in the encoder, and the token columns that are not in memory yet
seconds   all tokens at the rate of the probe batches; the writer works beside the model
Nothing is left in the workspace. Memory is of this process: its present resident set plus the growth.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache.corpus import Corpus
from cache.harvesting import PlannedBatch, plan_batches, probed_dtypes
from cache.pages import GROUP_BYTES, rows_per_group, write_shard
from cache.protocol import HookedModel
from cache.records import COLUMN, ITEMSIZE
from cache.store import ROWS_PER_SHARD, ActivationStore, plan_shards
from cache.workspace import workspace_path
from cache.writer import DTYPE_NAME, TORCH_DTYPE, TokenSlices, row_sums

PROBE_BATCHES = 6
_SAMPLE_ROWS = 65_536
_WRITER_BYTES_PER_ROW = 112
"""float64 class memberships, norms and peaks, and the token columns of a shard that is being written."""
_RECORD_BYTES = 2_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Needs of a harvest, of what is missing only."""

    tokens: int
    """Tokens that the model still has to run over."""
    shards: int
    hooks: dict[str, str]
    """Store dtype of each hook."""
    disk_bytes: int
    """Bytes that will be added to the store."""
    free_disk_bytes: int
    memory_bytes: int
    """Peak resident set of this process."""
    memory_growth_bytes: int
    """Of which the harvest adds so much."""
    device_memory_bytes: int | None
    """Peak on the accelerator; None where the model is on the CPU."""
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        gib = 2**30
        hooks = ", ".join(f"{h} ({t})" for h, t in self.hooks.items())
        device = (
            ""
            if self.device_memory_bytes is None
            else f", {self.device_memory_bytes / gib:.2f} GiB on the device"
        )
        return "\n".join([
            f"tokens  {self.tokens:,} in {self.shards} shards at {hooks}",
            f"disk    {self.disk_bytes / gib:.3f} GiB ({self.free_disk_bytes / gib:.1f} GiB are free)",
            f"memory  {self.memory_bytes / gib:.2f} GiB at the peak ({self.memory_growth_bytes / gib:.2f} GiB more than now)"
            + device,
            f"time    {self.seconds:,.0f} s at {self.tokens_per_second:,.0f} tokens/s",
        ])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be done, and where it would go."""

    shards: list[tuple[int, int, int, int]]
    missing: dict[str, set[int]]
    dtypes: dict[str, str]

    @property
    def todo(self) -> list[int]:
        return sorted(set().union(*self.missing.values()))


def estimate(
    model: HookedModel,
    corpus: Corpus,
    hooks: Sequence[str],
    *,
    identity: dict[str, Any],
    workspace: str | os.PathLike[str] | None,
    batch_tokens: int,
    rows_per_shard: int | None,
    dtype: str,
) -> Estimate:
    """See `harvest(..., dry_run=True)`."""
    root = workspace_path(workspace)
    now = _status("VmRSS") or 0
    with _peak() as peak:
        plan = _plan(
            model,
            corpus,
            list(hooks),
            ActivationStore.folder_of(root, identity, corpus),
            rows_per_shard,
            dtype,
        )
        rate = _probe(model, corpus, plan, batch_tokens, root / "_tmp") if plan.todo else 0.0
    tokens = sum(plan.shards[s][3] - plan.shards[s][2] for s in plan.todo)
    growth = peak[0] + _shard_memory(model, corpus, plan) if plan.todo else 0
    device = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    return Estimate(
        tokens=tokens,
        shards=len(plan.todo),
        hooks=plan.dtypes,
        disk_bytes=_disk(model, corpus, plan),
        free_disk_bytes=shutil.disk_usage(root).free,
        memory_bytes=now + growth,
        memory_growth_bytes=growth,
        device_memory_bytes=device,
        seconds=tokens / rate if rate else 0.0,
        tokens_per_second=rate,
    )


def _plan(
    model: HookedModel, corpus: Corpus, hooks: list[str], folder: Path, rows_per_shard: int | None, dtype: str
) -> _Plan:
    """Without making a store: of one that is there, only what it lacks."""
    store = ActivationStore(folder, corpus) if (folder / "store.json").exists() else None
    shards = store.shards if store else plan_shards(corpus.seq_offsets, rows_per_shard or ROWS_PER_SHARD)
    done = {h: store.committed(h) if store else set() for h in hooks}
    stored = {h: store.dtype(h) for h in hooks if store and done[h]}
    known = {h: stored.get(h, dtype) for h in hooks if h in stored or dtype != "auto"}
    missing = {h: set(range(len(shards))) - done[h] for h in hooks}
    todo = sorted(set().union(*missing.values()))
    if todo:
        probed = probed_dtypes(model, corpus, shards[todo[0]][:2], [h for h in hooks if h not in known])
        known |= {h: DTYPE_NAME[t] for h, t in probed.items()}
    return _Plan(shards=shards, missing=missing, dtypes={h: known[h] for h in hooks})


def _probe(model: HookedModel, corpus: Corpus, plan: _Plan, batch_tokens: int, tmp: Path) -> float:
    """Run the widest batches and a few more, write what one gives; returns tokens per second."""
    lengths = np.diff(corpus.seq_offsets)
    longest = max(plan.todo, key=lambda s: int(lengths[plan.shards[s][0] : plan.shards[s][1]].max()))
    batches = list(plan_batches(corpus, *plan.shards[longest][:2], batch_tokens))
    widest = max(batches, key=lambda b: b.tokens.numel())
    for batch in (batches[-1], widest):  # the first pass also pays for what is loaded once
        vectors = _vectors(model, batch, plan)
    _write(corpus, vectors, tmp)
    picks = np.unique(np.linspace(0, len(batches) - 1, PROBE_BATCHES).round().astype(int))
    began, rows = time.monotonic(), 0
    for i in picks:
        _vectors(model, batches[i], plan)
        rows += len(batches[i].rows)
    return rows / max(time.monotonic() - began, 1e-9)


def _vectors(model: HookedModel, batch: PlannedBatch, plan: _Plan) -> dict[str, Tensor]:
    acts = model.capture(batch.tokens, list(plan.dtypes))
    return {h: batch.real(x, h).to(TORCH_DTYPE[plan.dtypes[h]]).cpu() for h, x in acts.items()}


def _write(corpus: Corpus, vectors: dict[str, Tensor], tmp: Path) -> None:
    """The writer's work on a few rows, so that what it loads and needs once is in the measured growth."""
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        for x in vectors.values():
            narrow = TokenSlices(corpus.path / "tokens.parquet").read(0, len(x))
            norm, _ = row_sums(x, np.zeros(len(x), np.uint8))
            narrow = narrow.append_column("norm", pa.array(norm.astype(np.float32)))
            raw = x.contiguous().view(torch.uint8).numpy()
            write_shard(Path(folder) / "probe.parquet", narrow, {COLUMN: raw}, rows_per_group(raw.shape[1]))


def _shard_memory(model: HookedModel, corpus: Corpus, plan: _Plan) -> int:
    """Bytes that grow with the size of a shard or of the corpus, and are not in a probe."""
    width = {h: model.d_hook(h) * ITEMSIZE[t] for h, t in plan.dtypes.items()}
    sizes = [plan.shards[s][3] - plan.shards[s][2] for s in plan.todo]
    rows = max(sizes)
    # Two sets of buffers in turn: what is not filled takes no memory.
    buffers = sum(max(sizes[i::2], default=0) for i in (0, 1)) * sum(width.values())
    group = min(GROUP_BYTES, rows * max(width.values()))
    columns = sum(corpus.n_tokens for c in ("flags", "split") if not corpus.is_loaded(c))
    return buffers + rows * _WRITER_BYTES_PER_ROW + 4 * group + columns


def _disk(model: HookedModel, corpus: Corpus, plan: _Plan) -> int:
    total = 0.0
    for hook, shards in plan.missing.items():
        if not shards:
            continue
        d = model.d_hook(hook)
        group = rows_per_group(d * ITEMSIZE[plan.dtypes[hook]])
        rows = sum(plan.shards[s][3] - plan.shards[s][2] for s in shards)
        narrow = _narrow_bytes_per_row(corpus, plan.shards[min(shards)], group)
        record = _RECORD_BYTES + 4 * 2 * 8 * d * 4 / 3  # two float64 sums of each row class as base64
        total += rows * (d * ITEMSIZE[plan.dtypes[hook]] + narrow) + len(shards) * record + 250 * rows / group
    return round(total)


def _narrow_bytes_per_row(corpus: Corpus, shard: tuple[int, int, int, int], group: int) -> float:
    """Compressed doc, pos, tok and norm of some rows; norms are noise to a compressor."""
    rows = min(_SAMPLE_ROWS, shard[3] - shard[2])
    narrow = TokenSlices(corpus.path / "tokens.parquet").read(shard[2], shard[2] + rows)
    norm = np.random.default_rng(0).lognormal(3.0, 0.3, rows).astype(np.float32)
    sink = io.BytesIO()
    pq.write_table(
        narrow.append_column("norm", pa.array(norm)), sink, compression="zstd", row_group_size=group
    )
    return sink.tell() / rows


# ---- memory of this process ----


def _status(key: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":")), None)
    except OSError:
        return None


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Growth of the resident set inside the block, at its peak: out[0] bytes."""
    out = [0]
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    except OSError:
        before = None
    start = _max_resident() if before is None else before
    yield out
    end = _max_resident() if before is None else _status("VmHWM")
    out[0] = max(0, (end or 0) - start)


def _max_resident() -> int:
    """Peak of the whole life of the process, where it cannot be reset."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
