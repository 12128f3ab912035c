"""The atomic inner product (AIP, arXiv 2509.20784): the geometry in which residual directions are not skewed.

    C = (1/N) sum x x^T,   S = (C + ridge tr(C)/d I)^-1,   <u, v> = u^T S v / (||u||_S ||v||_S)
    root = S^(1/2), inverse = S^(-1/2)   symmetric, float64 [d_model, d_model]; x~ = x root is white: E||x~||^2 = d_model

The cosine of the AIP is the Euclidean one after whitening. The second moment is not centred, as in the paper;
`centred` takes the covariance instead. Everything is summed in float64, a batch at a time, over two halves of the rows,
so that `angle_change` can say how much of the geometry is the sample's: the total variation between the angle
histograms of the same rows whitened by one half and by the other. Pairwise angles centre at 90 degrees after whitening for any
data: that is a check of the estimate, no finding. Rows keep their mean: where S is that of the covariance, E||x~||^2 is
d_model + mu^T S mu (`mean_square_norm` of the record).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.errors import DataError, MissingDataError
from cache.workspace import atomic_file, read_json, write_json

ROWS_PER_DIMENSION = 10
RIDGE = 1e-6
ROWS = 100_000
"""Rows of an estimate (the paper's 100K), or ROWS_PER_DIMENSION * d_model where that is more."""
ANGLE_ROWS = 512
TENSORS, RECORD = "aip.safetensors", "aip.json"


@dataclass(frozen=True)
class AIP:
    """Both roots of S, float64 on the CPU, and the record of how they were estimated."""

    root: Tensor
    inverse: Tensor
    record: dict[str, Any]

    def whiten(self, x: Tensor) -> Tensor:
        """Rows `[..., d_model]` in the space where the AIP is the ordinary inner product; dtype and device of x."""
        return x @ self.root.to(x)

    def unwhiten(self, x: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return x @ self.inverse.to(x)

    def cosine(self, u: Tensor, v: Tensor) -> Tensor:
        """AIP cosines `[n, m]` of rows u `[n, d_model]` and v `[m, d_model]`, float64."""
        a, b = (torch.nn.functional.normalize(self.whiten(t.double()), dim=1) for t in (u, v))
        return a @ b.T

    def save(self, folder: Path) -> None:
        """Write aip.safetensors and aip.json into a folder, each atomic."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / TENSORS) as tmp:
            save_file({"root": self.root.contiguous(), "inverse": self.inverse.contiguous()}, tmp)
        write_json(folder / RECORD, self.record)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises MissingDataError or DataError."""
        folder = Path(folder)
        if not (folder / RECORD).is_file() or not (folder / TENSORS).is_file():
            raise MissingDataError(f"no AIP in {folder}: it stands beside SAEs trained with space='aip'")
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as e:
            raise DataError(f"{folder / TENSORS} is not readable ({e}): train the SAE again") from e
        record = read_json(folder / RECORD)
        d = record.get("d_model") if isinstance(record, dict) else None
        if set(tensors) != {"root", "inverse"} or any(tuple(t.shape) != (d, d) for t in tensors.values()):
            raise DataError(f"{folder / TENSORS} does not hold two roots of width {d}, as {RECORD} says")
        return cls(tensors["root"], tensors["inverse"], record)


class SecondMoment:
    """Sums of x x^T over two halves of the rows: `add` batches, then ask for the `aip`."""

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self._n = [0, 0]
        self._sum = torch.zeros(2, d_model, dtype=torch.float64)
        self._outer = torch.zeros(2, d_model, d_model, dtype=torch.float64)
        self._rows: list[list[Tensor]] = [[], []]

    @property
    def n(self) -> int:
        """Rows seen."""
        return sum(self._n)

    def add(self, x: Tensor) -> None:
        """Rows `[B, d_model]`: the first part of each batch goes to one half, the rest to the other."""
        x = x.detach().cpu()
        for half, part in enumerate(x.tensor_split(2)):
            kept = sum(map(len, self._rows[half]))
            if kept < ANGLE_ROWS:
                self._rows[half].append(part[: ANGLE_ROWS - kept].double())
            for rows in part.split(4096):
                rows = rows.double()
                self._sum[half] += rows.sum(0)
                self._outer[half].addmm_(rows.T, rows)
            self._n[half] += len(part)

    def moment(self, half: int | None = None, *, centred: bool = False) -> Tensor:
        """E[x x^T], or the covariance, of all rows or of one half."""
        halves = [0, 1] if half is None else [half]
        n = max(sum(self._n[h] for h in halves), 1)
        c, mean = self._outer[halves].sum(0) / n, self._sum[halves].sum(0) / n
        return c - torch.outer(mean, mean) if centred else c

    def aip(self, *, ridge: float = RIDGE, centred: bool = False) -> AIP:
        """The two roots and their record. Raises DataError on too few rows, or on rows that are all zero."""
        if self.n < ROWS_PER_DIMENSION * self.d_model:
            raise DataError(
                f"the AIP of width {self.d_model} needs at least {ROWS_PER_DIMENSION * self.d_model:,} rows "
                f"({ROWS_PER_DIMENSION} a dimension), there are {self.n:,}: harvest more tokens"
            )
        root, inverse, eigenvalues = roots(self.moment(centred=centred), ridge)
        own = [roots(self.moment(half, centred=centred), ridge)[0] for half in (0, 1)]
        rows = [torch.cat(r) for r in self._rows]
        under = [[angle_histogram(r @ w) for w in own] for r in rows]
        white, plain = ([angle_histogram(r) for r in part] for part in ([r @ root for r in rows], rows))
        record = {
            "schema_version": 1,
            "d_model": self.d_model,
            "rows": self.n,
            "ridge": ridge,
            "centred": centred,
            "mean_square_norm": float((root @ self.moment() @ root).trace()),
            "condition": condition(eigenvalues),
            "condition_ridged": condition(eigenvalues + ridge * eigenvalues.mean()),
            "angle_centre": histogram_median((white[0] + white[1]) / 2),
            "angle_centre_euclid": histogram_median((plain[0] + plain[1]) / 2),
            "angle_change": float(np.mean([0.5 * np.abs(a - b).sum() for a, b in under])),
        }
        return AIP(root, inverse, record)


def roots(moment: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """S^(1/2), S^(-1/2) and the eigenvalues of C (before the ridge, none below 0)."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    eigenvalues = eigenvalues.clamp_min(0.0)
    ridged = eigenvalues + ridge * eigenvalues.mean()
    if not ridged.min() > 0:
        raise DataError(
            "the second moment of these rows is singular: with ridge 0 every direction needs variance; set a ridge"
        )
    return (vectors * ridged.rsqrt()) @ vectors.T, (vectors * ridged.sqrt()) @ vectors.T, eigenvalues


def condition(eigenvalues: Tensor) -> float:
    """Largest over smallest eigenvalue; below rounding error of the largest, rounding error counts."""
    top = eigenvalues.max()
    return float(top / eigenvalues.min().clamp_min(top * torch.finfo(torch.float64).eps))


def angle_histogram(rows: Tensor, bins: int = 180) -> np.ndarray:
    """Shares of pairwise angles of rows `[n, d]` in `bins` equal parts of 0 to 180 degrees."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    i, j = torch.triu_indices(len(rows), len(rows), offset=1)
    angle = torch.rad2deg(torch.acos((unit @ unit.T)[i, j].clamp(-1, 1)))
    counts, _ = np.histogram(angle.numpy(), bins=bins, range=(0.0, 180.0))
    return counts / max(counts.sum(), 1)


def histogram_median(shares: np.ndarray) -> float:
    """Angle in degrees at which half of the pairs are narrower, interpolated within its bin."""
    total = np.concatenate([[0.0], np.cumsum(shares)])
    return float(np.interp(0.5, total, np.linspace(0.0, 180.0, len(total))))


def estimate_rows(d_model: int, available: int) -> int:
    """Rows that an estimate reads: ROWS or what the width needs, at most what there is."""
    return min(max(ROWS, ROWS_PER_DIMENSION * d_model), available)


def second_moment(batches: Iterable[Tensor], d_model: int, rows: int) -> SecondMoment:
    """Of the first `rows` rows of batches `[B, d_model]`."""
    moment = SecondMoment(d_model)
    for x in batches:
        moment.add(x[: rows - moment.n])
        if moment.n >= rows:
            break
    return moment


def store_aip(
    store: Any, hook: str, *, rows: int | None = None, ridge: float = RIDGE, centred: bool = False
) -> AIP:
    """The AIP of a store's train rows, without position 0."""
    available = store.stats(hook, split="train", skip="first").n
    wanted = min(rows or estimate_rows(store.d(hook), available), available)
    size = max(1, min(4096, available))
    stream = store.stream([hook], batch_size=size, seed=0, split="train", skip="first")
    try:
        moment = second_moment((b.x[hook] for b in stream), store.d(hook), wanted)
    finally:
        stream.close()
    return moment.aip(ridge=ridge, centred=centred)
