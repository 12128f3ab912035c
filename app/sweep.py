"""Sweeps: a job's SAEs times a grid, trained together as far as memory goes, else in groups one after the other.

grid: {k: [16, 32, 64], lr: [4.0e-4, 8.0e-4], train.seed: [0, 1]}

Every entry of `saes:` is taken with every combination. Fields of an SAE (its learning rate `lr` among them) share one pass
over the data; fields of the run, written `train.<field>`, change what a batch is, so each combination of them is a run.
An SAE is named for what varies beside k, d_sae and preset.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from app import jobs
from cache.errors import UsageError
from saes.config import SAEConfig, TrainConfig

SHARE = 0.8
"""Of the memory that is free when a sweep starts, what its runs may take."""
IN_LABEL = ("k", "d_sae", "preset", "name")


@dataclass(frozen=True, kw_only=True)
class Run:
    """SAEs that are trained in one pass, and its peak of memory in bytes as estimated."""

    saes: list[SAEConfig]
    schedule: TrainConfig
    need: dict[str, float]


def plan(
    expanded: list[tuple[list[SAEConfig], TrainConfig]],
    d_model: int,
    d_out: int = 0,
    budget: float | None = None,
) -> tuple[list[Run], float]:
    """What `expand` gave as runs, each within `budget` bytes where its SAEs one by one are; and the budget in use.

    budget: default SHARE of the free memory.
    """
    budget = budget or SHARE * free_memory()
    runs = [
        Run(saes=group, schedule=schedule, need=_need(group, schedule, d_model, d_out))
        for saes, schedule in expanded
        for group in _groups(saes, schedule, d_model, d_out, budget)
    ]
    return runs, budget


def expand(job: dict[str, Any]) -> list[tuple[list[SAEConfig], TrainConfig]]:
    """SAEs and schedule of each run that the grid asks for; one run without a grid. UsageError on what is no job."""
    job = dict(job)
    grid = _checked(job.pop("grid", None))
    of_run = {k.removeprefix("train."): v for k, v in grid.items() if k.startswith("train.")}
    of_sae = {k: v for k, v in grid.items() if not k.startswith("train.")}
    if not of_sae and not of_run:
        return [jobs.resolve(job)]
    entries = job.get("saes") or []
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        jobs.resolve(job)  # says what is wrong
    varied = [_entry(e, point) for e in entries for point in _points(of_sae)]
    return [
        jobs.resolve(job | {"saes": varied, "train": (job.get("train") or {}) | point})
        for point in _points(of_run)
    ]


def _checked(grid: Any) -> dict[str, list[Any]]:
    if grid is None:
        return {}
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UsageError("grid must map fields to lists of values, for example grid: {k: [16, 32, 64]}")
    return grid


def _points(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _entry(entry: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    twice = sorted(set(entry) & set(point))
    if twice:
        raise UsageError(f"{', '.join(twice)} stands in saes and in grid: name it in one of them")
    out = entry | point
    more = [f"{k}{_short(v)}" for k, v in point.items() if k not in IN_LABEL]
    if more and "name" not in point:
        (config,), _ = jobs.resolve({"saes": [out]})
        out["name"] = "-".join([entry.get("name") or config.label, *more])[:61]
    return out


def _short(value: Any) -> str:
    """In the letters of a folder's name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def _groups(
    saes: list[SAEConfig], schedule: TrainConfig, d_model: int, d_out: int, budget: float
) -> list[list[SAEConfig]]:
    """In order, as many as fit at a time; one that does not fit alone is a group of its own."""
    groups: list[list[SAEConfig]] = []
    for sae in saes:
        grown = [*groups[-1], sae] if groups else [sae]
        if groups and _need(grown, schedule, d_model, d_out)["memory_bytes"] <= budget:
            groups[-1] = grown
        else:
            groups.append([sae])
    return groups


def _need(saes: list[SAEConfig], schedule: TrainConfig, d_model: int, d_out: int) -> dict[str, float]:
    return jobs.estimate(saes, schedule, d_model, d_model * 2, d_out)


def before(runs: list[Run], budget: float) -> list[str]:
    """What to tell before the start: the largest run's memory, how many runs, and which may not fit."""
    largest = max(run.need["memory_bytes"] for run in runs)
    lines = [f"about {largest / 2**30:.2f} GiB of memory"]
    if len(runs) > 1:
        sizes = " + ".join(str(len(run.saes)) for run in runs)
        lines.append(f"{sum(len(run.saes) for run in runs)} SAEs in {len(runs)} runs of {sizes}")
    if largest > budget:
        lines.append(
            f"that is above the {budget / 2**30:.2f} GiB to be used: a smaller d_sae or batch needs less"
        )
    return lines


def described(runs: list[Run], data: dict[str, Any], disk_bytes: int, as_json: bool) -> str:
    """The text of --dry-run: one run as it is, several as a list."""
    found = []
    for run in runs:
        need = run.need | {"disk_bytes": run.need["disk_bytes"] + (disk_bytes if run is runs[0] else 0)}
        resolved = {"saes": [s.to_dict() for s in run.saes], "train": run.schedule.to_dict()}
        found.append((resolved, need))
    memory = max(need["memory_bytes"] for _, need in found)
    disk = sum(need["disk_bytes"] for _, need in found)
    if as_json:
        parts = [resolved | {"estimate": need} for resolved, need in found]
    else:
        parts = [resolved for resolved, _ in found]
    text = json.dumps(parts[0] | data if len(parts) == 1 else {"runs": parts} | data, indent=1)
    return text if as_json else f"{text}\nmemory {memory / 2**30:.2f} GiB, disk {disk / 2**30:.2f} GiB"


def free_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say (no /proc)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
