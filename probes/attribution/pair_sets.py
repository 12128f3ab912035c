"""Built-in sets of prompt pairs, made from templates and checked against the model's own tokenizer.

indirect_object  When Mary met John, Mary smiled at → John (noise: John smiled at)      after arXiv 2211.00593
greater_than     The war went from 1742 to 17 → 5 to 9 (noise: from 1712)                after arXiv 2305.00586
city_country     The city of Paris is in → France (noise: Rome)
gender_pronoun   Because Mary was tired, → she (noise: John)
a_an             I had one pear. I ate → a (noise: apple)

A word is used only where it is one token in its place, so all pairs of a set have one length and positions mean the same
in all of them. The same seed and tokenizer give the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations, product
from typing import Any

import numpy as np

from cache.errors import DataError, UsageError
from probes.attribution.pairs import PromptPair, tokenise

Option = PromptPair | Callable[[], PromptPair]
"""A pair, or how to make it where that takes time."""

MEN = ["John", "James", "Michael", "David", "Robert", "Paul", "Mark", "Peter", "Tom", "George", "Jack", "Henry", "Adam", "Simon", "Eric", "Ryan", "Kevin", "Brian", "Steve", "Charles"]  # fmt: skip
WOMEN = ["Mary", "Anna", "Sarah", "Emma", "Lisa", "Jane", "Laura", "Alice", "Susan", "Karen", "Maria", "Rachel", "Julia", "Linda", "Helen", "Kate", "Amy", "Jennifer", "Emily", "Ruth"]  # fmt: skip
CITIES = {
    "Paris": "France", "Rome": "Italy", "London": "England", "Tokyo": "Japan", "Berlin": "Germany", "Madrid": "Spain",
    "Moscow": "Russia", "Cairo": "Egypt", "Athens": "Greece", "Beijing": "China", "Vienna": "Austria", "Delhi": "India",
    "Dublin": "Ireland", "Lisbon": "Portugal", "Warsaw": "Poland", "Oslo": "Norway", "Stockholm": "Sweden",
    "Toronto": "Canada", "Sydney": "Australia", "Lima": "Peru", "Baghdad": "Iraq", "Tehran": "Iran", "Havana": "Cuba",
    "Seoul": "Korea", "Prague": "Czech", "Jerusalem": "Israel", "Chicago": "America", "Istanbul": "Turkey",
}  # fmt: skip
CONSONANT = ["pear", "peach", "banana", "lemon", "potato", "tomato", "cookie", "cake", "sandwich", "steak", "salad", "pizza", "burger", "carrot", "melon"]  # fmt: skip
VOWEL = ["apple", "egg", "orange", "onion", "olive", "oyster", "almond", "avocado", "apricot", "eggplant"]


class _Words:
    """Which words are one token after a space."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def single(self, words: list[str] | dict[str, str]) -> list[str]:
        return [w for w in words if len(self.ids(f" {w}")) == 1]


def _indirect_object(words: _Words) -> Iterator[Option]:
    for a, b in permutations(words.single(MEN + WOMEN), 2):
        clean, noise = (f"When {a} met {b}, {who} smiled at" for who in (a, b))
        yield PromptPair(clean=clean, noise=noise, answers=(f" {b}",), wrong=(f" {a}",))


def _greater_than(words: _Words) -> Iterator[Option]:
    noun = words.single(["war", "siege", "crisis", "reign", "trial", "strike", "voyage", "famine", "project"])
    for what, century, year in product(noun, (16, 17, 18), range(22, 79)):
        yield partial(_years, words, f"The {what} went from {century}", century, year)


def _years(words: _Words, start: str, century: int, year: int) -> PromptPair:
    """Answers are what the tokenizer makes of the years after, wrong ones of the years before: digits or numbers."""
    text = f"{start}{year} to {century}"
    n = len(words.ids(text))
    right, wrong = (
        {words.ids(f"{text}{y:02d}")[n] for y in years} for years in (range(year + 1, 100), range(year))
    )
    texts = [tuple(sorted(words.tokenizer.decode([t]) for t in s)) for s in (right - wrong, wrong - right)]
    return PromptPair(clean=text, noise=f"{start}02 to {century}", answers=texts[0], wrong=texts[1])


def _city_country(words: _Words) -> Iterator[Option]:
    for a, b in permutations(words.single(CITIES), 2):
        yield PromptPair(
            clean=f"The city of {a} is in",
            noise=f"The city of {b} is in",
            answers=(f" {CITIES[a]}",),
            wrong=(f" {CITIES[b]}",),
        )


def _gender_pronoun(words: _Words) -> Iterator[Option]:
    men, women = words.single(MEN), words.single(WOMEN)
    for state, man, woman in product(("tired", "late", "hungry", "sick", "happy"), men, women):
        for a, b, right, wrong in ((woman, man, " she", " he"), (man, woman, " he", " she")):
            clean, noise = (f"Because {name} was {state}," for name in (a, b))
            yield PromptPair(clean=clean, noise=noise, answers=(right,), wrong=(wrong,))


def _a_an(words: _Words) -> Iterator[Option]:
    plain, vowel = words.single(CONSONANT), words.single(VOWEL)
    for verb, c, v in product(("ate", "took", "bought"), plain, vowel):
        for a, b, right, wrong in ((c, v, " a", " an"), (v, c, " an", " a")):
            clean, noise = (f"I had one {noun}. I {verb}" for noun in (a, b))
            yield PromptPair(clean=clean, noise=noise, answers=(right,), wrong=(wrong,))


PAIR_SETS: dict[str, Callable[[_Words], Iterator[Option]]] = {
    "indirect_object": _indirect_object, "greater_than": _greater_than, "city_country": _city_country,
    "gender_pronoun": _gender_pronoun, "a_an": _a_an,
}  # fmt: skip


def pair_set(name: str, tokenizer: Any, n: int = 10, *, seed: int = 0) -> list[PromptPair]:
    """`n` different pairs of a built-in set, drawn by `seed`; DataError where the tokenizer leaves fewer."""
    if name not in PAIR_SETS:
        raise UsageError(f"no pair set {name!r}: choose {', '.join(PAIR_SETS)}, or give a JSONL file")
    options = list(PAIR_SETS[name](_Words(tokenizer)))
    found: list[PromptPair] = []
    length: int | None = None
    for i in np.random.default_rng(seed).permutation(len(options)):
        option = options[i]
        pair = option if isinstance(option, PromptPair) else option()
        try:
            tokens = tokenise(pair, tokenizer)
        except DataError:
            continue
        single = all(len(a) == 1 for a in tokens.answers + tokens.wrong)
        if single and length in (None, len(tokens.clean)):
            length = len(tokens.clean)
            found.append(PromptPair(**{**vars(pair), "name": name}))
        if len(found) == n:
            return found
    raise DataError(
        f"{name}: this tokenizer keeps {len(found)} aligned pairs of {len(options)}, {n} were asked for: ask for fewer"
    )
