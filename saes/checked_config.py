"""What the configs share: a JSON round trip that refuses unknown keys, and checks of numbers."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from cache.errors import UsageError


class CheckedConfig:
    """Base of the frozen dataclasses `SAEConfig` and `TrainConfig`."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(
                f"{cls.__name__} has no field {', '.join(unknown)}: known are {', '.join(sorted(known))}"
            )
        return cls(**values)

    def _check_numbers(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            kind, _, optional = f.type.partition(" | ")
            value, word = getattr(self, f.name), {"int": "whole number", "float": "number"}.get(kind)
            if word and not isinstance(value, int | float) and not (optional and value is None):
                raise UsageError(f"{f.name} must be a {word}, got {value!r}")

    def _check_whole(self, least: int, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UsageError(f"{field} must be a whole number of at least {least}, got {value}")

    def _check_moment(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{field} is a moment of Adam, from 0 to below 1, got {value}")
