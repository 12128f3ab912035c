"""Prompt pairs: a clean and a noise prompt of equal token length, with right and wrong answers.

A pair file is JSONL, one object a line: {"clean": ..., "noise": ..., "answers": [...], "wrong": [...]}; answers may be a
single string. Answers carry their leading space, as in " Paris". Patching replaces activations position by position,
so two prompts that are not aligned token for token are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import atomic_file


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """Two prompts that differ in what is asked, and the answers that tell them apart."""

    clean: str
    """The prompt whose behaviour is explained."""
    noise: str
    """The prompt whose activations are patched in."""
    answers: tuple[str, ...] = ()
    """Right continuations of the clean prompt; KL and a callable of one's own need none."""
    wrong: tuple[str, ...] = ()
    """Continuations that the noise prompt would have."""
    name: str = ""
    """Pair set it belongs to."""


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """A pair as token ids of equal length."""

    clean: tuple[int, ...]
    noise: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    wrong: tuple[tuple[int, ...], ...] = ()
    text: PromptPair | None = None

    @property
    def first_difference(self) -> int:
        """First position at which the prompts differ; earlier nodes have effect exactly 0."""
        return next(i for i, (a, b) in enumerate(zip(self.clean, self.noise)) if a != b)


def tokenise(pair: PromptPair, tokenizer: Any) -> TokenPair:
    """Token ids of a pair. DataError where the prompts differ in length, are the same, or an answer is empty."""
    clean, noise = (tuple(tokenizer(text).input_ids) for text in (pair.clean, pair.noise))
    if len(clean) != len(noise):
        raise DataError(
            f"{pair.clean!r} has {len(clean)} tokens and {pair.noise!r} has {len(noise)}: "
            "patching needs prompts of equal token length, so choose words of as many tokens"
        )
    if clean == noise:
        raise DataError(f"{pair.clean!r}: clean and noise are the same tokens, so no node can have an effect")

    def ids(texts: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tokenizer(t, add_special_tokens=False).input_ids) for t in texts)

    answers, wrong = ids(pair.answers), ids(pair.wrong)
    if not all(answers) or not all(wrong):
        raise DataError(
            f"{pair.clean!r}: an answer is empty: write it with its leading space, as in ' Paris'"
        )
    return TokenPair(clean=clean, noise=noise, answers=answers, wrong=wrong, text=pair)


def read_pairs(path: str | Path) -> list[PromptPair]:
    """Pairs of a JSONL file; DataError names the line that is not one."""
    file = Path(path)
    if not file.is_file():
        raise MissingDataError(f"no pair file {file}: give a JSONL file with clean, noise, answers and wrong")
    pairs = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8") from e
    # not splitlines: a prompt may hold U+2028 and its like, which end no line of JSONL
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            pairs.append(_parsed(line, f"{file}:{number}", file.stem))
    if not pairs:
        raise DataError(f"{file} holds no pair: write one JSON object a line")
    return pairs


def write_pairs(path: str | Path, pairs: Sequence[PromptPair]) -> None:
    """Write a pair file, atomically."""
    rows = [
        {
            "clean": p.clean,
            "noise": p.noise,
            "answers": list(p.answers),
            "wrong": list(p.wrong),
            "name": p.name,
        }
        for p in pairs
    ]
    with atomic_file(Path(path)) as tmp:
        tmp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def _parsed(line: str, where: str, name: str) -> PromptPair:
    try:
        row = json.loads(line)
        fields = {key: row.get(key, []) for key in ("answers", "wrong")}
        lists = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in fields.items()}
        texts = [row["clean"], row["noise"], *lists["answers"], *lists["wrong"]]
        if not all(isinstance(t, str) for t in texts):
            raise TypeError("texts must be strings")
        return PromptPair(clean=row["clean"], noise=row["noise"], name=str(row.get("name") or name), **lists)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f'{where} is not a pair ({e}): write {{"clean": ..., "noise": ..., "answers": [...], "wrong": [...]}}'
        ) from e


def as_pairs(clean: Any, noise: Any, tokenizer: Any) -> list[TokenPair]:
    """What `attribute` takes as token pairs: a pair, a list of pairs, or clean and noise prompts (text or lists of it)."""
    if noise is not None:
        texts = [[side] if isinstance(side, str) else list(side) for side in (clean, noise)]
        if len(texts[0]) != len(texts[1]):
            raise UsageError(
                f"{len(texts[0])} clean and {len(texts[1])} noise prompts: give one noise prompt for each"
            )
        clean = [PromptPair(clean=c, noise=n) for c, n in zip(*texts)]
    elif isinstance(clean, (PromptPair, TokenPair)):
        clean = [clean]
    elif isinstance(clean, str):
        raise UsageError("a prompt alone cannot be attributed: give attribute(clean, noise), or a PromptPair")
    out = [tokenise(p, tokenizer) if isinstance(p, PromptPair) else p for p in clean]
    if not out:
        raise UsageError("no pairs: give at least one PromptPair")
    return out
