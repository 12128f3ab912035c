"""The workspace folder and the only ways in which files get into it.

Every artifact is written to `<workspace>/_tmp/`, synced, and renamed into place, so a reader never sees
half a file and a killed process leaves nothing but a file in `_tmp/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.errors import DataError, MissingDataError, UsageError

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
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success sync it and rename it to `path`, on error remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = tmp_root(path) / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield tmp
        fsync_file(tmp)
        os.replace(tmp, path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success sync its files and rename it to `path` (replacing an old one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = tmp_root(path) / f"{path.name}.{uuid.uuid4().hex}.tmp"
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                fsync_file(file)
        old = None
        if path.exists():
            old = tmp.with_suffix(".old")
            os.replace(path, old)
        os.replace(tmp, path)
        fsync_dir(path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


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
