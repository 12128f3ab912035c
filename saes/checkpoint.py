"""Checkpoints of a run: one folder `checkpoints/step-<n>`, written atomically; the newest complete one wins.

state.json holds the step, the position in the data and each SAE's counters; state.safetensors holds the tensors.
Weights here are unfolded: checkpoints are for resuming, never for loading as an SAE.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.workspace import atomic_dir, read_json, write_json

KEEP = 2


class Checkpoint(NamedTuple):
    """Step count already done, state of the data stream, and (tensors, counters) of each SAE."""

    step: int
    stream: dict[str, Any]
    saes: list[tuple[dict[str, Tensor], dict[str, Any]]]


def _folders(run: Path) -> list[tuple[int, Path]]:
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / "state.json").is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and drop all but the newest KEEP."""
    path = run / "checkpoints" / f"step-{checkpoint.step:08d}"
    with atomic_dir(path) as tmp:
        tensors = {
            f"{i}.{name}": t.detach().cpu().contiguous()
            for i, (named, _) in enumerate(checkpoint.saes)
            for name, t in named.items()
        }
        save_file(_apart(tensors), tmp / "state.safetensors")
        state = {
            "schema_version": 1,
            "step": checkpoint.step,
            "stream": checkpoint.stream,
            "saes": [counters for _, counters in checkpoint.saes],
        }
        write_json(tmp / "state.json", state)
    for _, old in _folders(run)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those alone that share memory with one before, which safetensors refuses: a copy of all is a second run."""
    seen: set[int] = set()
    out = {}
    for name, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        out[name] = t.clone() if place in seen else t
        seen.add(place)
    return out


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None."""
    folders = _folders(run)
    if not folders:
        return None
    _, path = folders[-1]
    state = read_json(path / "state.json")
    tensors = load_file(path / "state.safetensors")
    saes = []
    for i, counters in enumerate(state["saes"]):
        prefix = f"{i}."
        saes.append(
            ({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, counters)
        )
    return Checkpoint(state["step"], state["stream"], saes)


def latest_step(run: Path) -> int:
    """Step of the newest checkpoint of a run, 0 without one."""
    folders = _folders(run)
    return folders[-1][0] if folders else 0


def finished_checkpoints(workspace: Path) -> list[Path]:
    """`checkpoints` folders of runs that have finished: a run removes its own, unless it is killed just then."""
    found = []
    for path in sorted(workspace.glob("saes/*/checkpoints")):
        run = path.parent / "run.json"
        if run.is_file() and read_json(run).get("status") == "finished":
            found.append(path)
    return found
