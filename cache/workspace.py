"""The workspace folder and the only ways in which files get into it.

Every artifact is written to a folder of its own in `<workspace>/_tmp/`, synced, and renamed into place, so a reader
never sees half a file and a killed process leaves nothing but such a folder. Its writer holds a lock (flock) on
it, which the system takes back when the process ends: `stale_tmp` lists what no living process is writing.
A full disk is an AtomscopeError that says so; the half-written file is removed and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError

ENV_HOME = "ATOMSCOPE_HOME"


def workspace_path(path: str | os.PathLike[str] | None = None, *, create: bool = True) -> Path:
    """The workspace: `path`, else `$ATOMSCOPE_HOME`, else `./workspace`.

    Raises UsageError where the folder cannot be made or written to (only if `create`), and
    MissingDataError where it does not exist and `create` is false.
    """
    root = Path(path or os.environ.get(ENV_HOME) or "workspace").expanduser().resolve()
    if not create:
        if not root.is_dir():
            raise MissingDataError(f"no workspace at {root}: run `atomscope demo`, or set {ENV_HOME}")
        return root
    try:
        (root / "_tmp").mkdir(parents=True, exist_ok=True)
        probe = root / "_tmp" / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UsageError(
            f"workspace {root} is not writable ({e.strerror}): choose another with --workspace or {ENV_HOME}"
        ) from e
    return root


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tmp_root(path: Path) -> Path:
    """The `_tmp` folder on the same file system as `path`: the workspace's, else one beside it."""
    for parent in path.parents:
        if (parent / "_tmp").is_dir():
            return parent / "_tmp"
    made = path.parent / "_tmp"
    made.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def locked(folder: Path, *, exclusive: bool = False, without: bool = False) -> Iterator[bool]:
    """Hold a lock on a folder while in the block: many writers share it, an exclusive one is alone or gets False.

    Where the file system has no locks, writers go on without one; `without`: an exclusive one too.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except OSError as e:
            held = isinstance(e, BlockingIOError)
            yield not exclusive or (without and not held)
            return
        yield True
    finally:
        os.close(fd)


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Be the only process that holds this folder, which is made if need be; the lock goes with the process.

    what: the sentence before "by another process". Raises AtomscopeError where another one holds it. Without locks in the
    file system nobody is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, exclusive=True, without=True) as alone:
        if not alone:
            raise AtomscopeError(
                f"{what} by another process: wait for it, or stop it to go on here ({folder})"
            )
        yield


@contextlib.contextmanager
def scratch_for(path: Path) -> Iterator[Path]:
    """A locked folder in `_tmp` in which to make `path`; it is removed at the end, whatever happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    room = tmp_root(path) / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        room.mkdir()
        with locked(room):
            yield room
    except Exception as e:
        if no_space(e):
            raise AtomscopeError(
                f"no space left for {path}: free some and run the same command again, "
                "everything that was finished before is kept"
            ) from e
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def no_space(error: BaseException) -> bool:
    """Whether an error means a full disk, a quota or a limit on file size; not every library sets errno."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = str(error)
    return getattr(error, "errno", None) in full or any(os.strerror(n) in text for n in full)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success sync it and rename it to `path`, on error remove it."""
    with scratch_for(path) as room:
        tmp = room / path.name
        yield tmp
        fsync_file(tmp)
        os.replace(tmp, path)
        fsync_dir(path.parent)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success sync its files and rename it to `path` (replacing an old one)."""
    with scratch_for(path) as room:
        tmp = room / path.name
        tmp.mkdir()
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                fsync_file(file)
        if path.exists():
            os.replace(path, room / "replaced")
        os.replace(tmp, path)
        fsync_dir(path.parent)


def stale_tmp(workspace: Path, older_than: float) -> list[Path]:
    """What is in `_tmp` that was last written `older_than` seconds ago or earlier and that nobody holds."""
    found = []
    for entry in sorted((workspace / "_tmp").glob("*")):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            newest = max(p.lstat().st_mtime for p in [entry, *entry.rglob("*")])
            if time.time() - newest >= older_than and not _held(entry):
                found.append(entry)
    return found


def _held(entry: Path) -> bool:
    if not entry.is_dir():
        return False
    with locked(entry, exclusive=True) as alone:
        return not alone


def write_new_json(path: Path, value: Any) -> bool:
    """Write `value` as JSON unless `path` is there already; of two processes that try, one gets True."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    with scratch_for(path) as room:
        tmp = room / path.name
        tmp.write_text(text + "\n", encoding="utf-8")
        fsync_file(tmp)
        try:
            os.link(tmp, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            os.replace(tmp, path)
        fsync_dir(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    with atomic_file(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise MissingDataError(f"{path} does not exist") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path} is not valid JSON ({e}): delete it and run the step that wrote it again"
        ) from e


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. What content ids are hashed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
