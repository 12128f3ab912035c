"""Where an artifact came from: versions, commit, device and time, stored beside every artifact."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "atomscope",
    "torch",
    "transformers",
    "transformer-lens",
    "nnsight",
    "pyarrow",
    "duckdb",
    "numpy",
)


@functools.cache
def versions() -> dict[str, str]:
    """Version of each package that can change a number."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


@functools.cache
def git_commit() -> str | None:
    """Commit of the project's own checkout, `+dirty` if files changed; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.SubprocessError, OSError):
        return None


def provenance(*, started: float | None = None, **extra: Any) -> dict[str, Any]:
    """A record to store with an artifact. `started` (time.time()) adds `wall_seconds`."""
    now = time.time()
    out: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if started is not None:
        out["wall_seconds"] = round(now - started, 3)
    return out | extra
