"""Peak memory and disk of a training run, before it starts.

    memory = weights and both Adam moments of every SAE
           + the largest of: the start (sample of rows, first weights), a step, the end (threshold and + poles on rows)
           + two windows of the stream, and what the allocator keeps

SAEs of a run step one after the other and share the buffers of a step, gradients included, so a step counts once, as its
largest. Assumed are half of the latents dead where there is AuxK, and as many stored latents as a threshold SAE may have
before it turns dense. tests/test_footprint.py holds it to measured peaks of processes of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.pages import rows_per_group
from saes.config import SAEConfig
from saes.train_config import TrainConfig

GIB = 2**30
BLOCK = 128 * 2**20
"""Most that a block of pre-activations takes (`top_products.CHUNK_BYTES`)."""
SAMPLE_ROWS, CHECK_ROWS = 16_384, 4096
"""Rows at the start and the end of a run (`training`, `trainer`)."""
KEPT = 64 * 2**20
"""Freed pieces that the allocator does not give back; those of less than 32 MiB it keeps."""
ENTRY = 120
"""Bytes of a stored latent of a row in a step: ids, value, row, order by latent, their gradients."""


def estimate(
    saes: Sequence[SAEConfig],
    config: TrainConfig,
    d_model: int,
    row_bytes: int,
    d_out: int = 0,
    tensor_rows: int = 0,
    store_rows: int | None = None,
) -> dict[str, float]:
    """Peak memory and disk of a run in bytes.

    store_rows: of the store, where they are known: a window has no more.

    row_bytes: of a stored row; d_out: width of what transcoders predict, whose rows are read too, 0: SAEs; tensor_rows: of
    data in memory, which is not counted but for the copy that its norms take, 0: a store.
    """
    width, read = d_model + (d_out or d_model), d_model + d_out
    parameters = sum(c.d_sae * (width + 1) + (d_out or d_model) for c in saes)
    held: dict[str, float] = {}
    for c in saes:
        for name, size in _buffers(c, config, d_model, width).items():
            held[name] = max(held.get(name, 0), size)
    step = max(_step(c, config, width) for c in saes)
    end = max(_end(c, width, read) for c in saes)
    # the sample, scaled, and its squares or its median in float64
    start = 4 * 4 * (SAMPLE_ROWS + config.batch_size) * read + max(_first(c, width) for c in saes)
    state = 12 * parameters + 24 * sum(c.d_sae for c in saes)
    moving = max(start, sum(held.values()) + max(step, end))
    memory = state + moving + KEPT + (0 if tensor_rows else _windows(config, d_model, d_out, store_rows))
    return {
        "parameters": parameters,
        "memory_bytes": max(memory, 8 * tensor_rows * max(d_model, d_out)),
        "disk_bytes": 4 * parameters,
        "checkpoint_bytes_while_running": 3 * 12 * parameters,
        "rows_read_bytes": config.steps * config.batch_size * (row_bytes + 2 * d_out),
    }


def _buffers(c: SAEConfig, config: TrainConfig, d_model: int, width: int) -> dict[str, float]:
    """What a step of this SAE keeps in the run's scratch (`top_products.Scratch`), by kind."""
    places = config.batch_size * c.d_sae
    held: dict[str, float] = {"gradients": 4 * c.d_sae * width, "u": min(4.5 * places, BLOCK)}
    if not c.fixed_k:
        held |= {"mask": held["u"] / 4, "abs": held["u"] * c.signed}
    if groups := _groups(c):
        held["nested"] = 4 * config.batch_size * groups * (width - d_model)
    if config.screen != "off":
        # weights and rows in bfloat16, a block of their product, a block of float32
        held["half"] = 2 * (c.d_sae + config.batch_size) * (d_model + 8) + min(2 * places, BLOCK) + 2**24
    return held


def _step(c: SAEConfig, config: TrainConfig, width: int) -> float:
    """What a step of this SAE makes and lets go."""
    places = config.batch_size * c.d_sae
    rows = 6 * 4 * config.batch_size * width
    if not c.has_k:
        # eight dense tensors of a batch; small ones leave gaps that the next does not fill
        return rows + 32 * places + min(16 * places, KEPT) + 4 * c.d_sae * width
    stored = config.batch_size * c.selected * ENTRY * (1 if c.fixed_k else 2)
    nested = 2 * 4 * config.batch_size * _groups(c) * width
    screened = 44 * places / 24 if config.screen != "off" else 0
    dead = 8 * places + 4 * c.d_sae * width if c.auxk > 0 else 0
    # pairs of nearest atoms are looked up in blocks; a decoder that is pulled apart has gradients of its own
    apart = 8 * 1024 * c.d_sae + 20 * c.d_sae * width if c.separability else 0
    return rows + nested + max(stored, screened) + dead + apart


def _groups(c: SAEConfig) -> int:
    """Nested reconstructions of a row; 0: a single one."""
    return 2 if c.multi_topk else len(c.matryoshka) + bool(c.matryoshka)


def _first(c: SAEConfig, width: int) -> float:
    """First weights: directions, and one reconstruction of 1,024 rows."""
    return 4 * c.d_sae * width / 2 + (8 if not c.has_k else 4) * 1024 * c.d_sae


def _end(c: SAEConfig, width: int, read: int) -> float:
    """The folded SAE is hashed and saved; some are tried on rows of a sample."""
    saved = 4 * c.d_sae * width
    if c.fixed_k and not c.signed:
        return saved
    block = min(4 * CHECK_ROWS * c.d_sae, BLOCK)
    tried = block * (1 if c.fixed_k else 1.25 + c.signed) + CHECK_ROWS * max(c.k, 1) * ENTRY
    return saved + 2 * 4 * SAMPLE_ROWS * read + tried


def _windows(config: TrainConfig, d_model: int, d_out: int, store_rows: int | None) -> float:
    """Two windows of rows and their order, and the batches that a stream hands out in turn."""
    rows = config.window * rows_per_group(2 * d_model)
    rows = rows if store_rows is None else min(rows, store_rows)
    return 2 * rows * (2 * (d_model + d_out) + 16) + 40 * rows + 12 * config.batch_size * (d_model + d_out)


def free_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say (no /proc)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def tell(saes: Sequence[SAEConfig], config: TrainConfig, source: Any, device: Any) -> None:
    """One line on stderr before a run starts, and another where it needs more than is free on its `torch.device`."""
    rows = len(source.x) if hasattr(source, "x") else 0
    config = replace(config, window=getattr(source, "ring_window", config.window))
    store = None if rows else source.store.corpus.n_tokens
    need = estimate(saes, config, source.d_model, 2 * source.d_model, source.d_out, rows, store)[
        "memory_bytes"
    ]
    print(f"about {need / GIB:.2f} GiB of memory", file=sys.stderr, flush=True)
    free = free_memory()
    if device.type == "cuda":
        import torch

        free = float(torch.cuda.mem_get_info(device)[0])
    if need > free:
        line = (
            f"warning: about {need / GIB:.2f} GiB are needed and {free / GIB:.2f} GiB are free: a smaller d_sae, batch_size or "
            "window, or fewer SAEs at a time, needs less"
        )
        print(line, file=sys.stderr, flush=True)
