"""What a workspace can do without: data files that no record names, and what dead writers left in `_tmp`.

Nothing younger than the given age is touched, and nothing that a living process is writing: writers hold locks on
their folders (workspace.py, writer.py). Committed shards are never garbage, damaged ones included.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cache.errors import AtomscopeError
from cache.records import ShardRecord, list_records, record_path
from cache.workspace import locked, stale_tmp

HOUR = 3600.0


class Garbage(NamedTuple):
    """One file or folder that may go."""

    path: Path
    bytes: int
    why: str


def collect_garbage(
    workspace: Path, *, older_than: float = HOUR, delete: bool = False, more: Iterable[tuple[Path, str]] = ()
) -> list[Garbage]:
    """List the garbage of a workspace and, with `delete`, remove it. `older_than` is in seconds.

    `more` are (path, why) that another layer knows to be garbage.
    """
    found = [Garbage(p, size_of(p), "left in _tmp by a process that ended") for p in stale_tmp(workspace, older_than)]  # fmt: skip
    found += [Garbage(p, size_of(p), "a ring that no process uses; its run makes it again") for p in idle_rings(workspace, older_than)]  # fmt: skip
    found += [Garbage(p, size_of(p), why) for p, why in more]
    if delete:
        for item in found:
            remove(item.path)
    for folder in sorted(workspace.glob("activations/*/acts/*")):
        with locked(folder, exclusive=True) as alone:
            orphans = _orphans(folder, older_than) if alone else []
            if delete:
                for item in orphans:
                    remove(item.path)
            found += orphans
    return found


def idle_rings(workspace: Path, older_than: float) -> list[Path]:
    """Rings (cache/ring.py) whose lock nobody holds and that were last written `older_than` seconds ago or earlier."""
    return [
        ring
        for ring in sorted(p for p in workspace.glob("rings/*") if p.is_dir())
        if time.time() - newest(ring) >= older_than and not _is_held(ring / "lock")
    ]


def newest(path: Path) -> float:
    """Time of the last write to a file or to anything in a folder."""
    times = [path.lstat().st_mtime]
    for p in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # its writer has just replaced it
            times.append(p.lstat().st_mtime)
    return max(times)


def _is_held(lock: Path) -> bool:
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _orphans(folder: Path, older_than: float) -> list[Garbage]:
    """Data files of one hook without a record; those of a shard whose record cannot be read are kept."""
    kept: set[str] = set()
    unread: list[str] = []
    for shard in list_records(folder):
        try:
            kept.add(ShardRecord.load(record_path(folder, shard)).file)
        except AtomscopeError:
            unread.append(f"shard-{shard:05d}-")
    out = []
    for path in sorted(folder.glob("shard-*.parquet")):
        old = time.time() - path.stat().st_mtime >= older_than
        if old and path.name not in kept and not path.name.startswith(tuple(unread)):
            out.append(Garbage(path, size_of(path), "a shard that was never committed"))
    return out


def size_of(path: Path) -> int:
    """Bytes of a file or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(p.lstat().st_size for p in files if not p.is_dir())


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
