"""Arrays of an .npz archive, read only once what it claims to hold is possible.

An archive is compressed, so one of a few kilobytes may claim terabytes. Before any array is read, the header of each
(shape and type) must agree with the size that the archive states for it and with the shapes of the others, and all of
them together may be at most INFLATION times the file (SLACK bytes at least): trained weights hardly compress.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache.errors import DataError, MissingDataError

INFLATION = 16
SLACK = 64 << 20
HEADER_BYTES = 4096
"""More than the header of any array of numbers."""
_DAMAGED = (ValueError, TypeError, OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)  # fmt: skip


class _Claim(NamedTuple):
    """One array as its header says."""

    shape: tuple[int, ...]
    bytes: int
    """Of header and values."""


def read_npz(
    path: Path, shapes: Mapping[str, tuple[str, ...]], aliases: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The arrays named in `shapes`, as float32; an archive that holds others is refused.

    shapes: of each array its axes by name, so that axes of one name have one length: {"W": ("d", "n"), "b": ("n",)}.
    aliases: further names in the file. Raises DataError on damage or a claim that cannot be, MissingDataError without a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            names = {aliases.get(n, n): n for n in members}
            if set(names) != set(shapes) or len(archive.infolist()) != len(shapes):
                raise DataError(f"{path} holds {sorted(members)}, expected {sorted(shapes)}")
            claims = {n: _claim(archive, members[given]) for n, given in names.items()}
            _check(path, claims, {n: members[given].file_size for n, given in names.items()}, shapes)
        with np.load(path, allow_pickle=False) as held:
            return {n: held[names[n]].astype(np.float32, casting="same_kind") for n in shapes}
    except FileNotFoundError as e:
        raise MissingDataError(f"{path} does not exist: the SAE folder is incomplete") from e
    except _DAMAGED as e:
        raise DataError(f"{path} is not a readable archive of plain arrays ({e}): fetch it again") from e


def _claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Claim:
    """From the first bytes of a member; the rest stays compressed."""
    with archive.open(member) as file:
        head = io.BytesIO(file.read(HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"{member.filename} is of version {version}")
    shape, _, dtype = read[version](head, max_header_size=HEADER_BYTES)
    if dtype.kind not in "fiub":
        raise ValueError(f"{member.filename} holds {dtype}, not numbers")
    return _Claim(shape, head.tell() + math.prod(shape) * dtype.itemsize)


def _check(
    path: Path, claims: Mapping[str, _Claim], stated: Mapping[str, int], shapes: Mapping[str, tuple[str, ...]]
) -> None:
    """Refuse arrays that are not of one size with the archive's own list, with each other, or with the file."""
    lengths: dict[str, int] = {}
    for name, axes in shapes.items():
        shape, size = claims[name]
        want = tuple(lengths.setdefault(axis, n) for axis, n in zip(axes, shape))
        if shape != want or len(shape) != len(axes):
            raise DataError(f"{path}: {name} has shape {shape}, which does not belong to the other arrays")
        if size != stated[name]:
            raise DataError(
                f"{path}: {name} claims {size:,} bytes, the archive holds {stated[name]:,} of it: fetch it again"
            )
    total, on_disk = sum(c.bytes for c in claims.values()), path.stat().st_size
    if total > max(SLACK, INFLATION * on_disk):
        raise DataError(
            f"{path} claims {total / 1e9:,.1f} GB of weights in a file of {on_disk / 1e6:,.1f} MB, which no trained weights "
            "do: it is not read; fetch it again from its makers"
        )
