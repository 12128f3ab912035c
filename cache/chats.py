"""Dialogues as lists of messages, whatever shape they come in.

[{"role", "content"}, …]          OpenAI style: `messages`
[{"from", "value"}, …]            ShareGPT style: `conversations`; human, gpt, … are renamed
[{"content": [{"type": "text", "text": …}, …]}]   parts are joined; other parts are refused
`packaged_pairs` makes question-and-answer dialogues out of the packaged evaluation sets (Apache-2.0 wheel, each set
under its own licence).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache.errors import DataError

ROLES = ("none", "system", "user", "assistant", "tool", "other")
"""Role codes of the token table are indices into this; none = text that belongs to no message."""
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
_ALIASES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function": "tool", "ipython": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip


class Message(NamedTuple):
    role: str
    content: str


def role_code(role: str) -> int:
    """Code of a role name, 5 for one that is not known."""
    return ROLES.index(role) if role in ROLES else ROLES.index("other")


def parse_messages(value: Any, place: str) -> tuple[Message, ...]:
    """Messages of one dialogue; DataError that names `place` for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise DataError(f'{place}: a dialogue is a list of {{"role": …, "content": …}}, got {value!r:.60}')
    return tuple(_message(m, f"{place}, message {i}") for i, m in enumerate(value))


def _message(value: Any, place: str) -> Message:
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise DataError(f'{place} is {value!r:.60}: give {{"role": …, "content": …}}')
    role = value.get("role") or value.get("from")
    content = value.get("content") if "content" in value else value.get("value")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else None  # type: ignore[arg-type]
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{place} has no text "role" and "content" (or "from" and "value")')
    return Message(_ALIASES.get(role, role), content)


def packaged_pairs(wheel: Path, members: Sequence[str]) -> Iterator[tuple[str, tuple[Message, ...]]]:
    """(set, dialogue) of every answered question of the packaged sets, in file order."""
    with zipfile.ZipFile(wheel) as z:
        for member in members:
            name = member.split("/")[-2].lower()
            with z.open(member) as lines:
                for line in lines:
                    pair = _pair(json.loads(line)) if line.strip() else None
                    if pair is not None:
                        yield name, pair


def _pair(row: dict[str, Any]) -> tuple[Message, ...] | None:
    answer = row.get("answer", {True: "Yes", False: "No"}.get(row.get("label", ""), ""))
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    parts = [row.get("passage"), row["question"], row.get("options")]
    asked = "\n\n".join(p.strip() for p in parts if isinstance(p, str) and p.strip())
    if not isinstance(answer, str) or not answer.strip() or not asked:
        return None
    return Message("user", asked), Message("assistant", answer.strip())
