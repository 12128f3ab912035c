"""One dialogue through a tokenizer's chat template, with the role of every token.

1. The frame of each role, i.e. the text before and after a message's content, is learnt once from a synthetic
   dialogue, and so is what the template puts before the first message (BOS, a default system prompt).
2. A rendered dialogue is walked frame by frame. Where it does not fit (a template that merges messages, say), the
   contents are searched in order, and the text between two of them goes to the later one.
3. The rendered text is tokenised once; a token with any character of a content is content, the rest is template.
Nothing is added to or taken from what `apply_chat_template` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cache.chats import Message, role_code
from cache.errors import DataError, UsageError

_MARKS = ("\ue001", "\ue002", "\ue003", "\ue004")  # private-use characters: in no template and no text


class Frame(NamedTuple):
    """What the template writes around the content of a message."""

    before: str
    after: str


class Segment(NamedTuple):
    """Characters start … next segment's start of a rendered dialogue."""

    start: int
    role: int
    content: bool


class Dialogue(NamedTuple):
    """Token ids of a dialogue, int32 [n]; role uint8 [n]; template bool [n]: no character is of a content."""

    ids: np.ndarray
    role: np.ndarray
    template: np.ndarray


class ChatTemplate:
    """Renders and tokenises dialogues with the chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "this tokenizer has no chat template, so it is of a base model: use mode='document', or a chat model"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                "dialogues need a fast tokenizer (tokenizer.json), which tells where a token stands"
            )
        self._tokenizer = tokenizer
        self._frames: dict[str, Frame | None] = {}
        bos = getattr(tokenizer, "bos_token", None) or ""
        user, answer = (Message(r, m) for r, m in zip(("user", "assistant"), _MARKS))
        whole = self._try([user, answer, Message("user", _MARKS[2])]) or ""
        first, second = self._try([user]), self._try([user, answer])
        if first and second and whole.startswith(second) and second.startswith(first):
            after = first.partition(_MARKS[0])[2]
            closing = second.partition(_MARKS[1])[2]
            opening = whole[len(second) : whole.index(_MARKS[2])]
            self._frames["user"] = Frame(opening, after)
            self._frames["assistant"] = Frame(second[len(first) : second.index(_MARKS[1])], closing)
            # Where every message opens with it (SmolLM2), it is no BOS of the dialogue.
            bos = "" if opening.startswith(bos) else bos
        self._bos = bos if whole.startswith(bos) else ""
        self._learn_system()
        self._preamble = self._learn_preamble(whole.partition(_MARKS[0])[0])

    def _try(self, messages: Sequence[Message]) -> str | None:
        """The rendered text, None where the template refuses."""
        try:
            return self.render(messages)
        except DataError:
            return None

    def render(self, messages: Sequence[Message]) -> str:
        """The dialogue as the template writes it, without a generation prompt."""
        chat = [m._asdict() for m in messages]
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        except Exception as e:  # whatever a template raises: jinja errors, and raise_exception() in it
            raise DataError(f"the chat template refuses it ({str(e).splitlines()[0]:.80})") from e

    def _learn_system(self) -> None:
        text = self._try([Message("system", _MARKS[0]), Message("user", _MARKS[1])])
        user = self._frames.get("user")
        self._frames["system"] = None
        if text and user and _MARKS[0] in text:
            head, _, tail = text.partition(_MARKS[0])
            between = tail.partition(_MARKS[1])[0]
            if between.endswith(user.before) and head.startswith(self._bos):
                after = between[: len(between) - len(user.before)]
                self._frames["system"] = Frame(head[len(self._bos) :], after)

    def _learn_preamble(self, head: str) -> list[Segment] | None:
        """Segments of what stands before the first message where that is not a system message; None: not known."""
        user, system = self._frames.get("user"), self._frames.get("system")
        if user is None or not head.endswith(user.before):
            return None
        self._head = head[: len(head) - len(user.before)]
        at, rest = len(self._bos), self._head[len(self._bos) :]
        segments = [Segment(0, 0, False)] if at else []
        if rest and system and rest.startswith(system.before) and rest.endswith(system.after):
            code = role_code("system")  # a default system prompt
            segments += [
                Segment(at, code, False),
                Segment(at + len(system.before), code, True),
                Segment(len(self._head) - len(system.after), code, False),
            ]
        elif rest:
            segments.append(Segment(at, 0, False))
        return segments

    def _frame(self, role: str) -> Frame | None:
        if role not in self._frames:
            before = [Message("user", _MARKS[0]), Message("assistant", _MARKS[1])]
            shorter, longer = self._try(before), self._try([*before, Message(role, _MARKS[2])])
            known = shorter and longer and longer.startswith(shorter) and _MARKS[2] in longer
            self._frames[role] = (
                Frame(*longer[len(shorter) :].split(_MARKS[2], 1)) if known else None  # type: ignore
            )
        return self._frames[role]

    def segments(self, text: str, messages: Sequence[Message]) -> list[Segment]:
        """Role and kind of every character of a rendered dialogue."""
        return self._walk(text, messages) or _search(text, messages)

    def _walk(self, text: str, messages: Sequence[Message]) -> list[Segment] | None:
        if messages[0].role == "system":
            out, at = ([Segment(0, 0, False)] if self._bos else []), len(self._bos)
        elif self._preamble is not None and text.startswith(self._head):
            out, at = list(self._preamble), len(self._head)
        else:
            return None
        for message in messages:
            frame, code = self._frame(message.role), role_code(message.role)
            if frame is None or not text.startswith(frame.before, at):
                return None
            start = at + len(frame.before)
            content = next(
                (c for c in _forms(message.content) if text.startswith(c + frame.after, start)), None
            )
            if content is None:
                return None
            end = start + len(content)
            out += [Segment(at, code, False), Segment(start, code, True), Segment(end, code, False)]
            at = end + len(frame.after)
        return out if at == len(text) else None

    def tokenise(self, dialogues: Sequence[Sequence[Message]], first: int = 0) -> list[Dialogue]:
        """Tokens and roles of a few dialogues, numbered from `first` in the error about one that cannot be rendered."""
        texts, segments = [], []
        for i, messages in enumerate(dialogues):
            try:
                texts.append(self.render(messages))
                segments.append(self.segments(texts[-1], messages))
            except DataError as e:
                raise DataError(f"dialogue {first + i}: {e}") from e
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            _assign(np.asarray(ids, np.int32), spans, parts)
            for ids, spans, parts in zip(encoded["input_ids"], encoded["offset_mapping"], segments)
        ]


def _forms(content: str) -> tuple[str, ...]:
    """The content as a template may write it: as it is, or trimmed."""
    return content, content.strip(), content.rstrip(), content.lstrip()


def _search(text: str, messages: Sequence[Message]) -> list[Segment]:
    out, at = [], 0
    for i, message in enumerate(messages):
        found = next(((s, c) for c in _forms(message.content) if (s := text.find(c, at)) >= 0), None)
        if found is None:
            raise DataError(f"the chat template changes or leaves out message {i}: its text cannot be placed")
        start, content = found
        code = role_code(message.role)
        out += [Segment(at, code, False), Segment(start, code, True)]
        at = start + len(content)
    return [*out, Segment(at, role_code(messages[-1].role), False)]


def _assign(ids: np.ndarray, spans: Sequence[tuple[int, int]], parts: list[Segment]) -> Dialogue:
    starts = np.array([p.start for p in parts])
    role_of = np.array([p.role for p in parts], np.uint8)
    is_content = np.array([p.content for p in parts])
    # Of empty segments that start at one place, searchsorted takes the last, the one that has characters.
    at = np.array(spans, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(at[:, 1]) if len(at) else at[:, 1]
    # Byte-level tokenizers leave white space out of their spans: a token begins where the one before it ended.
    begin = np.minimum(at[:, 0], np.concatenate([[0], ends[:-1]])) if len(at) else at[:, 0]
    first = np.searchsorted(starts, begin, side="right") - 1
    last = np.maximum(np.searchsorted(starts, np.maximum(ends - 1, begin), side="right") - 1, first)
    segment = first.copy()
    for i in np.flatnonzero(last > first):
        inside = [s for s in range(first[i], last[i] + 1) if is_content[s] and _length(starts, s) > 0]
        segment[i] = inside[0] if inside else first[i]
    return Dialogue(ids, role_of[segment], ~is_content[segment])


def _length(starts: np.ndarray, s: int) -> int:
    return int(starts[s + 1] - starts[s]) if s + 1 < len(starts) else 1
