"""A store through the encoder, shard by shard: the token-major half of an index (format: saes/code_files.py).

A shard is encoded once. It is done when its record is there, so a killed run goes on at the next one; a store that has
grown has its new shards encoded and no others; and of a store that begins with the same vectors as another (a longer
corpus of the same texts), shards whose bytes are the same are taken over from the index of that one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import AtomscopeError, UsageError
from cache.progress import progress
from cache.store import ActivationStore
from cache.workspace import atomic_file, read_json, write_json
from saes.code_files import (
    Part,
    counts_file,
    data_file,
    id_dtype,
    record_file,
    write_codes,
    write_varying,
)
from saes.sae import SAE

ENCODE_ROWS = 4096
_SKIP_FILE = "rows.json"


def write_all_codes(
    sae: SAE, store: Any, hook: str, folder: Path, *, shards: Sequence[int] | None = None, skip: str | None = "first"
) -> None:  # fmt: skip
    """Encode the rows of each of `shards` (default: all) that has no committed codes yet.

    skip: rows left out, as everywhere. Raises UsageError where the codes in `folder` were made with another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_rows(folder, skip)
    chosen = range(len(store.shards)) if shards is None else shards
    _take_over(store, hook, folder, chosen, skip)
    sizes = {i: store.shards[i][3] - store.shards[i][2] for i in chosen}
    done = sum(n for i, n in sizes.items() if record_file(folder, i).is_file())
    with progress("encode", sum(sizes.values()), unit="tok", done=done) as bar:
        for shard in chosen:
            row0, row1 = store.shards[shard][2:]
            if record_file(folder, shard).is_file():
                continue

            def parts(row0: int = row0, row1: int = row1) -> Iterator[Part]:
                for part in _encoded(sae, store, hook, row0, row1, skip):
                    yield part
                    bar.advance(len(part.at))

            if not sae.cfg.fixed_k:
                write_varying(folder, shard, row0, row1 - row0, parts, sae.cfg.d_sae)
                continue
            ids = np.zeros((row1 - row0, sae.cfg.k), dtype=id_dtype(sae.cfg.d_sae))
            values = np.zeros((row1 - row0, sae.cfg.k), dtype=np.float32)
            encoded = 0
            for part in parts():
                ids[part.at] = part.ids.reshape(-1, sae.cfg.k)
                values[part.at] = part.values.reshape(-1, sae.cfg.k)
                encoded += len(part.at)
            write_codes(folder, shard, row0, ids, values, encoded)


def rows_left_out(folder: Path) -> str | None:
    """The `skip` of the codes in `folder`."""
    path = folder / _SKIP_FILE
    return read_json(path)["skip"] if path.is_file() else "first"


def _same_rows(folder: Path, skip: str | None) -> None:
    path = folder / _SKIP_FILE
    if not any(folder.glob("shard-*.json")):  # nothing is encoded yet: a mistyped skip binds nobody
        write_json(path, {"schema_version": 1, "skip": skip})
    elif rows_left_out(folder) != skip:
        raise UsageError(
            f"{folder.parent} was begun with skip={rows_left_out(folder)!r}, not {skip!r}: "
            "use the same, or delete that folder"
        )


def _encoded(sae: SAE, store: Any, hook: str, row0: int, row1: int, skip: str | None) -> Iterator[Part]:
    """Codes of the rows of one shard, a batch at a time."""
    for batch in store.sequential(hook, batch_size=ENCODE_ROWS, split=None, skip=skip, start_row=row0):
        at = np.asarray(batch.row) - row0
        inside = int(np.searchsorted(at, row1 - row0))
        if inside:
            codes = sae.encode(batch.x[hook][:inside].to(sae.W_enc.device))
            counts = (
                np.full(inside, sae.cfg.k) if codes.offsets is None else codes.offsets.diff().cpu().numpy()
            )
            ids, values = codes.indices.reshape(-1).cpu().numpy(), codes.values.reshape(-1).cpu().numpy()
            yield Part(at[:inside], counts, ids, values)
        if inside < len(at):
            break


def _take_over(store: Any, hook: str, folder: Path, shards: Sequence[int], skip: str | None) -> None:
    """Copy codes of shards whose vectors are the same bytes in another store that this SAE has been run over."""
    todo = [i for i in shards if not record_file(folder, i).is_file()]
    mine = store.records(hook)
    for other in sorted(folder.parent.parent.glob(f"{folder.parent.name.partition('@')[0]}@*/codes")):
        path = store.path.parent / other.parent.name.partition("@")[2]
        if other == folder or not todo or not (path / "store.json").is_file():
            continue
        try:
            donor = ActivationStore.open(path)
            theirs = donor.records(hook)
            if rows_left_out(other) != skip:
                continue
        except AtomscopeError:  # a damaged store has nothing to give
            continue
        for shard in todo:
            same = shard in theirs and _same_shard(store, mine[shard], donor, theirs[shard])
            if same and record_file(other, shard).is_file():
                _copy(other, folder, shard)
        todo = [i for i in todo if not record_file(folder, i).is_file()]


def _same_shard(store: Any, a: Any, donor: Any, b: Any) -> bool:
    """The same rows with the same vectors, and the same flags, which say what is left out."""
    if (a.row0, a.rows, a.d, a.dtype) != (b.row0, b.rows, b.d, b.dtype):
        return False
    hashes = [[[p["xxh3"] for p in g["pages"].values()] for g in r.groups] for r in (a, b)]
    flags = [s.corpus.column("flags")[a.row0 : a.row0 + a.rows] for s in (store, donor)]
    return hashes[0] == hashes[1] and np.array_equal(*flags)


def _copy(source: Path, folder: Path, shard: int) -> None:
    """Data first, the record last: a shard is there when its record is."""
    for name in (data_file, counts_file, record_file):
        if name(source, shard).is_file():
            with atomic_file(name(folder, shard)) as tmp:
                shutil.copyfile(name(source, shard), tmp)


__all__ = ["rows_left_out", "write_all_codes"]
