"""Labels and notes as append-only events: workspace/annotations/<author>.jsonl, one JSON object a line.

App and notebooks write at the same time without a lock: each event is one `write` of one line to a file opened for
appending. The newest event for a key (sae_id, feature, sign) is the label in force; an empty text takes it away.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from cache.errors import DataError, UsageError

MAX_TEXT = 500
FIELDS = ("sae_id", "feature", "sign", "text", "author", "method", "score", "created")


def add_label(
    workspace: Path,
    *,
    sae_id: str,
    feature: int,
    text: str,
    sign: int = 1,
    author: str | None = None,
    method: str = "hand",
    score: float | None = None,
) -> dict[str, Any]:
    """Append a label event and return it. Raises UsageError on a bad sign, feature or an over-long text."""
    if sign not in (1, -1) or feature < 0:
        raise UsageError(f"a label needs a feature >= 0 and a sign of 1 or -1, got {feature} and {sign}")
    text = " ".join(text.split())
    if len(text) > MAX_TEXT:
        raise UsageError(f"a label has at most {MAX_TEXT} characters, got {len(text)}")
    author = author or _user()
    event = {
        "sae_id": sae_id, "feature": int(feature), "sign": sign, "text": text, "author": author, "method": method,
        "score": score, "created": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() % 10**9:09d}Z",
    }  # fmt: skip
    folder = workspace / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9._-]", "-", author.lower())[:40] or "someone"
    line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
    fd = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)
    return event


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "someone"


def label_events(workspace: Path) -> list[dict[str, Any]]:
    """All events, oldest first. A torn last line (a writer killed in mid-write) is skipped; other damage is an error."""
    events = []
    for path in sorted((workspace / "annotations").glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
                events.append({k: event[k] for k in FIELDS})
            except (ValueError, KeyError, TypeError) as e:
                if number == len(lines) - 1:
                    continue
                raise DataError(f"{path}, line {number + 1} is not a label event: remove that line") from e
    return sorted(events, key=lambda e: e["created"])


def current_labels(workspace: Path, sae_id: str | None = None) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The label in force of each (sae_id, feature, sign)."""
    latest: dict[tuple[str, int, int], dict[str, Any]] = {}
    for e in label_events(workspace):
        if sae_id is None or e["sae_id"] == sae_id:
            latest[(e["sae_id"], e["feature"], e["sign"])] = e
    return {k: e for k, e in latest.items() if e["text"]}
