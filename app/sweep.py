"""Sweeps: a job's SAEs times a grid, trained together as far as memory goes, else in groups one after the other.

grid: {k: [16, 32, 64], lr: [4.0e-4, 8.0e-4], train.seed: [0, 1]}

Every entry of `saes:` is taken with every combination. Fields of an SAE (its learning rate `lr` among them) share one pass
over the data; fields of the run, written `train.<field>`, change what a batch is, so each combination of them is a run.
An SAE is named for what varies beside k, d_sae and preset. Runs that an earlier start of the job has begun keep their SAEs
(saes/started.py); memory decides about the others only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from app import jobs
from cache.errors import DataError, UsageError
from saes.config import SAEConfig
from saes.footprint import estimate, free_memory
from saes.train_config import TrainConfig

SHARE = 0.8
"""Of the memory that is free when a sweep starts, what its runs may take."""
IN_LABEL = ("k", "d_sae", "preset", "name")
OWN = ("lr", "beta1")
"""Fields of the run that an SAE may have of its own."""


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
    begun: list[list[list[int]]] | None = None,
    *,
    rows: int | None = None,
    window: int | None = None,
) -> tuple[list[Run], float]:
    """What `expand` gave as runs, each within `budget` bytes where its SAEs one by one are; and the budget in use.

    budget: default SHARE of the free memory. begun: for each of `expanded`, the places of SAEs that stay together.
    rows: of the store, where known; window: of a ring, in the place of the schedule's.
    """
    budget = SHARE * free_memory() if budget is None else budget
    runs = []
    for (saes, schedule), kept in zip(expanded, begun or [[]] * len(expanded), strict=True):
        rest = [i for i in range(len(saes)) if not any(i in places for places in kept)]
        mixed = schedule if window is None else replace(schedule, window=window)
        need = partial(
            estimate, config=mixed, d_model=d_model, row_bytes=d_model * 2, d_out=d_out, store_rows=rows
        )
        grouped = _groups(rest, saes, need, budget)
        for places in sorted([*kept, *grouped], key=min):
            group = [saes[i] for i in places]
            runs.append(Run(saes=group, schedule=schedule, need=need(group)))
    return runs, budget


def memory_budget(gigabytes: float | None) -> float | None:
    """Bytes of --memory-gb; None where memory is looked up."""
    if gigabytes is not None and not gigabytes > 0:
        raise UsageError(
            f"--memory-gb must be above 0, got {gigabytes:g}: leave it out for {SHARE} of what is free"
        )
    return None if gigabytes is None else gigabytes * 1e9


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
    runs = [
        jobs.resolve(job | {"saes": varied, "train": (job.get("train") or {}) | point})
        for point in _points(of_run)
    ]
    for field in (f for f in OWN if f in of_run):
        hidden = [s.label for s in runs[0][0] if getattr(s, field) is not None]
        if hidden:
            raise UsageError(
                f"the grid has train.{field}, but {hidden[0]} has its own: an SAE's own {field} hides train.{field}, and it "
                f"would be trained {len(of_run[field])} times the same: name one of them"
            )
    return runs


def _checked(grid: Any) -> dict[str, list[Any]]:
    if grid is None:
        return {}
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UsageError("grid must map fields to lists of values, for example grid: {k: [16, 32, 64]}")
    for field, values in grid.items():
        seen: set[str] = set()
        for value in values:
            if (key := _key(value)) in seen:
                raise UsageError(
                    f"the grid names {field} {value} twice: the same SAEs would be trained twice"
                )
            seen.add(key)
    return grid


def _key(value: Any) -> str:
    """Equal for values that a field takes for the same: 4, 4.0 and the text 4e0."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return repr(float(value))
    return json.dumps(value, default=str)


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
    places: list[int], saes: list[SAEConfig], need: Callable[..., dict[str, float]], budget: float
) -> list[list[int]]:
    """Places in order, as many as fit at a time; an SAE that does not fit alone is a group of its own."""
    groups: list[list[int]] = []
    for i in places:
        grown = [*groups[-1], i] if groups else [i]
        if groups and need([saes[j] for j in grown])["memory_bytes"] <= budget:
            groups[-1] = grown
        else:
            groups.append([i])
    return groups


def begun(
    expanded: list[tuple[list[SAEConfig], TrainConfig]], data: Any, asked: bool, **where: Any
) -> list[list[list[int]]]:
    """For `plan`: what earlier starts have begun. asked: --memory-gb is given, so runs with nothing to lose are regrouped."""
    from saes.started import started_groups

    return [started_groups(data, saes, schedule, worth=asked, **where) for saes, schedule in expanded]


def train_all(runs: list[Run], data: Any, **where: Any) -> tuple[list[Any], list[str]]:
    """Results of the SAEs that were trained, and why the others were not: one that diverges costs no other.

    where: what `saes.train` takes besides. Raises its error where there is one run and all of it has diverged.
    """
    from saes import train
    from saes.runs import Diverged

    results, failed = [], []
    for run in runs:
        try:
            found = train(data, run.saes, run.schedule, **where)
        except Diverged as e:
            if len(runs) == 1:
                raise
            print(f"{e}; the next run starts", file=sys.stderr, flush=True)
            failed += e.reasons
            continue
        results += [r for r in found if r.failed is None]
        failed += [r.failed for r in found if r.failed is not None]
    return results, failed


def check(failed: list[str], trained: int) -> None:
    """End the command with an error that names the SAEs that diverged, once the others are saved and printed."""
    if failed:
        kept = "the others are saved" if trained else "none is left"
        raise DataError(f"{len(failed)} of {len(failed) + trained} SAEs failed, {kept}: {'; '.join(failed)}")


def before(runs: list[Run], budget: float) -> list[str]:
    """What to tell before the start, beside what `train` says of each run: how many there are, and which may not fit."""
    largest = max(run.need["memory_bytes"] for run in runs)
    lines = []
    if len(runs) > 1:
        sizes = " + ".join(str(len(run.saes)) for run in runs)
        lines.append(
            f"{sum(len(run.saes) for run in runs)} SAEs in {len(runs)} runs of {sizes}, "
            f"at most {largest / 2**30:.2f} GiB of memory at a time"
        )
    if budget < largest <= free_memory():  # past that, `train` warns
        lines.append(
            f"{largest / 2**30:.2f} GiB is above the {budget / 2**30:.2f} GiB to be used: a smaller d_sae or batch needs less"
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
