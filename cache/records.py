"""Commit records: one JSON beside every data file, and the sums that the statistics come from.

A shard exists when its record does. A record names its data file, where the values of every row group are,
their xxh3, and float64 sums over four classes of rows (train | heldout × first | rest in context), so that
any statistic is a merge of sums: mean = Σx / n, var = Σx² / n − mean², no pass over the data.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import DataError, MissingDataError
from cache.pages import Group
from cache.workspace import read_json, write_new_json

SCHEMA_VERSION = 1
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
COLUMN = "x"  # name of the vector column


def check_schema(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Refuse a file of another format version."""
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {found!r}, this version reads {SCHEMA_VERSION}: "
            "use the version that wrote it, or harvest again into another workspace"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Float64 sums over a set of rows; sets are merged by adding."""

    n: int
    sum: np.ndarray  # [d]
    sumsq: np.ndarray  # [d]
    sum_norm: float
    sum_sq_norm: float
    max_abs: float

    @classmethod
    def zero(cls, d: int) -> Sums:
        return cls(n=0, sum=np.zeros(d), sumsq=np.zeros(d), sum_norm=0.0, sum_sq_norm=0.0, max_abs=0.0)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            n=self.n + other.n,
            sum=self.sum + other.sum,
            sumsq=self.sumsq + other.sumsq,
            sum_norm=self.sum_norm + other.sum_norm,
            sum_sq_norm=self.sum_sq_norm + other.sum_sq_norm,
            max_abs=max(self.max_abs, other.max_abs),
        )

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"sum": _encode(self.sum), "sumsq": _encode(self.sumsq)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sums:
        return cls(**(value | {"sum": _decode(value["sum"]), "sumsq": _decode(value["sumsq"])}))


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode("ascii")


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is known of one committed shard of one hook."""

    hook: str
    shard: int
    file: str
    """Name of the data file beside the record."""
    bytes: int
    """Size of the data file."""
    row0: int
    """Row id of the first row."""
    rows: int
    d: int
    dtype: str
    """fp16, bf16 or fp32."""
    groups: list[Group]
    stats: dict[str, dict[str, Any]]
    """`Sums.to_json()` for each of ROW_CLASSES."""
    provenance: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def sums(self, classes: Iterable[str]) -> Sums:
        total = Sums.zero(self.d)
        for name in classes:
            total = total + Sums.from_json(self.stats[name])
        return total

    def save(self, folder: Path) -> None:
        """Commit the shard, unless another writer has done so first: a commit is never replaced."""
        write_new_json(record_path(folder, self.shard), vars(self))

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        value = check_schema(path, read_json(path))
        try:
            record = cls(**value)
        except TypeError as e:
            raise DataError(f"{path} is not a shard record ({e}): delete it and harvest again") from e
        sizes = {page["width"] for g in record.groups for page in g["pages"].values()}
        if sum(g["rows"] for g in record.groups) != record.rows or sizes != {
            ITEMSIZE.get(record.dtype, 0) * record.d
        }:
            raise DataError(f"{path} contradicts itself: delete it and harvest again")
        return record


def record_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.json"


def list_records(folder: Path) -> list[int]:
    """Numbers of the committed shards in a hook's folder, ascending."""
    found = (re.fullmatch(r"shard-(\d{5,})\.json", p.name) for p in folder.glob("shard-*.json"))
    return sorted(int(m[1]) for m in found if m)


def read_store_json(path: Path) -> dict[str, Any]:
    """`store.json` of a store folder."""
    file = path / "store.json"
    if not file.exists():
        raise MissingDataError(f"{path} is not an activation store (no store.json): run harvest first")
    return check_schema(file, read_json(file))
