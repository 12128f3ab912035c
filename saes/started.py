"""Which SAEs of a job stand together in a run folder already.

A sweep trains its SAEs in as few runs as memory allows, and the free memory is another one at each start; what has been
begun is therefore looked up by content, before the rest is grouped. Fields that came later stand for their defaults, as in
the names of runs (`runs.LATER`): a run begun before them is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import AtomscopeError
from cache.workspace import canonical_json, read_json
from saes import warm_start as warm_starts
from saes.binding import bind, open_source
from saes.checkpoint import latest_step
from saes.config import SAEConfig
from saes.runs import RECORD, named, run_name
from saes.train_config import TrainConfig


def started_groups(
    data: Any,
    saes: Sequence[SAEConfig],
    config: TrainConfig,
    *,
    hook: str | None = None,
    out_hook: str | None = None,
    warm_start: warm_starts.WarmStart = None,
    worth: bool = False,
) -> list[list[int]]:
    """Of the SAEs that `train` would be given: the places of those that stand together in a run folder already.

    Each place occurs once at most; finished runs come first, then those that have come furthest. worth: runs only that
    have finished or written a checkpoint, so that something would be lost without them.
    """
    found = _records(Path(data.workspace))
    if not found:
        return []
    source = open_source(data, hook, out_hook)
    bound = [bind(c, source) for c in saes]
    warm = warm_starts.resolve(warm_start, bound)
    texts = [canonical_json(named(c.to_dict())) for c in bound]
    free, groups = list(range(len(bound))), []
    for progress, run, configs in found:
        at = _places([canonical_json(named(c)) for c in configs], texts, free)
        # the folder's name stands for schedule, data and warm start too
        same = at and run.name == run_name([bound[i] for i in at], config, source, [warm[i] for i in at])
        if same and (progress or not worth):
            groups.append(at)
            free = [i for i in free if i not in at]
    return groups


def _records(workspace: Path) -> list[tuple[float, Path, list[dict[str, Any]]]]:
    """Of each run: step of its newest checkpoint (infinite: finished, 0: nothing to lose), folder, configs."""
    found = []
    for path in sorted(workspace.glob(f"saes/*/{RECORD}")):
        try:
            record = read_json(path)
        except AtomscopeError:
            continue
        done = math.inf if record.get("status") == "finished" else latest_step(path.parent)
        found.append((float(done), path.parent, record.get("configs", [])))
    return sorted(found, key=lambda f: -f[0])


def _places(wanted: list[str], texts: list[str], free: list[int]) -> list[int]:
    """A free place for each one that is wanted, in their order; [] where one has none."""
    left, places = list(free), []
    for text in wanted:
        i = next((i for i in left if texts[i] == text), None)
        if i is None:
            return []
        left.remove(i)
        places.append(i)
    return places
