"""The peers' training steps beside ours: processes that compute one at a time, in turns (peers/README.md).

`Peers` starts a worker for each trainer, gives all the same rows, and asks each for one step a round; `curves` trains
each from its start on equal tokens; `memory_growth` measures what the first steps add to a fresh process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
OWN = ("ours", "saelens")
"""Run in our environment; the others in the second one."""


def environment(folder: Path) -> Path:
    """Python of the second environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the peers' environment in {folder} (about a minute)", flush=True)
        subprocess.run([str(HERE / "peers" / "setup.sh"), str(folder), sys.executable], check=True)
    return python.absolute()


class Peer:
    """One worker process."""

    def __init__(self, name: str, python: Path, **job: Any) -> None:
        self.name = name
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]) if name in OWN else ""
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(job["threads"])}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [str(sys.executable if name in OWN else python), str(HERE / "peers" / "worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env,
        )  # fmt: skip
        self.ask("make", peer=name, **job)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do} | more) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"peer {self.name} ended: {self._log.read()[-2000:]}")
        return json.loads(line)

    def seconds(self) -> float:
        return self.ask("step")["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


class Rows:
    """A file of rows `[N, d]` that every worker reads."""

    def __init__(self, x: torch.Tensor, folder: Path) -> None:
        self.path = folder / f"rows-{x.shape[1]}-{len(x)}.npy"
        np.save(self.path, x.numpy())


def curves(
    names: dict[str, dict[str, Any]],
    python: Path,
    steps: int,
    every: int,
    lrs: tuple[float, ...],
    **job: Any,
) -> dict[str, Any]:
    """Held-out FVU after equal tokens of each trainer at its best learning rate; `names` maps a name to changes of the job."""
    out: dict[str, Any] = {"curves": {}, "curve_lrs": {}}
    for name, more in names.items():
        tried = {
            lr: _curve(Peer(name.split("-")[0], python, **(job | {"lr": lr} | more)), steps, every)
            for lr in lrs
        }
        best = min(tried, key=lambda lr: tried[lr][-1][1])
        out["curves"][name], out["curve_lrs"][name] = tried[best], best
        points = "  ".join(f"{t // 1000}k {f:.3f}" for t, f in tried[best])
        print(f"  {name:<22} lr {best:.0e}  {points}", flush=True)
    return out


def _curve(peer: Peer, steps: int, every: int) -> list[tuple[int, float]]:
    points = peer.ask("train", steps=steps, every=every)["fvu"]
    peer.close()
    return [(tokens, round(fvu, 4)) for tokens, fvu in points]


def memory_growth(
    names: dict[str, dict[str, Any]], python: Path, steps: int = 2, **job: Any
) -> dict[str, int]:
    """Bytes that the first steps add to a fresh process holding the constructed trainer."""
    out = {}
    for name, more in names.items():
        peer = Peer(name.split("-")[0], python, **(job | more))
        out[name] = peer.ask("memory", steps=steps)["growth"]
        peer.close()
    return out


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(p / q for p, q in zip(a, b, strict=True))
