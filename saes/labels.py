"""Labels and notes as append-only events: workspace/annotations/<author>.jsonl, one JSON object a line.

App, notebooks and commands write at the same time without a lock: an event is one `write` to a file opened for
appending. The newest label for a key (sae_id, feature, sign) is the label in force; an empty text takes it away.
Notes are events of kind `note`: all of them stay, none replaces another.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cache.errors import DataError, UsageError

MAX_TEXT = 500
MAX_NAME = 100
KINDS = ("label", "note")
FIELDS = ("kind", "sae_id", "feature", "sign", "text", "author", "method", "score", "created")
# the first bytes of every event: a line that begins so and breaks off is a write that a kill cut short
_BEGINNING = b'{"'


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
    kind: str = "label",
) -> dict[str, Any]:
    """Append one event and return it. Raises UsageError on a bad sign, feature, score or an over-long text."""
    event = make_event(
        sae_id=sae_id, feature=feature, text=text, sign=sign, author=author, method=method, score=score, kind=kind
    )  # fmt: skip
    append_events(workspace, [event])
    return event


def make_event(
    *,
    sae_id: str,
    feature: int,
    text: str,
    sign: int = 1,
    author: str | None = None,
    method: str = "hand",
    score: float | None = None,
    kind: str = "label",
) -> dict[str, Any]:
    """A checked event, stamped now. White space is collapsed and control characters are dropped."""
    if sign not in (1, -1) or feature < 0:
        raise UsageError(f"a label needs a feature >= 0 and a sign of 1 or -1, got {feature} and {sign}")
    if kind not in KINDS:
        raise UsageError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    if score is not None and not math.isfinite(score):
        raise UsageError(f"a score is a finite number or none, got {score}")
    text, author, method = clean(text), clean(author or "") or _user(), clean(method) or "hand"
    if len(text) > MAX_TEXT:
        raise UsageError(f"a label has at most {MAX_TEXT} characters, got {len(text)}")
    if max(len(author), len(method)) > MAX_NAME:
        raise UsageError(f"author and method of a label have at most {MAX_NAME} characters each")
    return {
        "kind": kind, "sae_id": sae_id, "feature": int(feature), "sign": int(sign), "text": text, "author": author,
        "method": method, "score": None if score is None else float(score), "created": _now(),
    }  # fmt: skip


def clean(text: str) -> str:
    """The text on one line: runs of white space are one space, control characters and lone surrogates are dropped."""
    return " ".join(
        "".join(c for c in text if unicodedata.category(c) not in _DROPPED or c in "\n\t\r").split()
    )


_DROPPED = {"Cc", "Cs"}


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "someone"


def append_events(workspace: Path, events: Sequence[dict[str, Any]]) -> None:
    """Append events, one write for each author's file; they are on disk when this returns."""
    folder = workspace / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[bytes]] = {}
    for event in events:
        name = re.sub(r"[^a-z0-9._-]", "-", event["author"].lower())[:40] or "someone"
        line = json.dumps({k: event[k] for k in FIELDS}, ensure_ascii=False, allow_nan=False).encode()
        files.setdefault(folder / f"{name}.jsonl", []).append(line)
    for path, lines in files.items():
        _append(path, b"".join(line + b"\n" for line in lines))


def _append(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data  # a writer was killed in mid-line: its half line must not swallow this one
        if os.write(fd, data) != len(data):
            raise DataError(
                f"{path} could not be written to its end: free some disk space and save the label again"
            )
        os.fsync(fd)
    finally:
        os.close(fd)


def all_events(workspace: Path, kinds: Iterable[str] = KINDS) -> list[dict[str, Any]]:
    """Labels and notes, oldest first. A half line (a writer killed in mid-write) is skipped; other damage is an error."""
    events, wanted = [], set(kinds)
    for path in sorted((workspace / "annotations").glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                event = {"kind": "label"} | json.loads(line)
                events.append({k: event[k] for k in FIELDS})
            except (ValueError, KeyError, TypeError) as e:
                torn = line.startswith(_BEGINNING) and not line.endswith(b"}")
                if torn or number == len(lines) - 1:
                    continue
                raise DataError(f"{path}, line {number + 1} is not a label event: remove that line") from e
    return sorted((e for e in events if e["kind"] in wanted), key=lambda e: e["created"])


def label_events(workspace: Path) -> list[dict[str, Any]]:
    """All label events, oldest first."""
    return all_events(workspace, ("label",))


def current_labels(workspace: Path, sae_id: str | None = None) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The label in force of each (sae_id, feature, sign)."""
    latest: dict[tuple[str, int, int], dict[str, Any]] = {}
    for e in label_events(workspace):
        if sae_id is None or e["sae_id"] == sae_id:
            latest[(e["sae_id"], e["feature"], e["sign"])] = e
    return {k: e for k, e in latest.items() if e["text"]}
