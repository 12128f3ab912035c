"""What the claim scripts share: the store, held-out rows, differences over seeds with their verdict, the report.

A claim is a difference in the direction the paper states, with the smallest effect that counts. Both are written in the
script's head before the run. Over seeds (pairs that saw the same data) the mean and its 95 % t interval decide:

    holds           the interval is above 0 and the mean is at least the effect
    does not hold   the whole interval is below the effect
    underpowered    anything else, or fewer than three seeds

Nothing is written into the workspace given: runs go to a temporary one that shares its stores.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cache import ActivationStore
from cache.errors import MissingDataError, UsageError
from cache.workspace import workspace_path
from saes.metrics import SINK_RATIO, Reconstruction

MIN_SEEDS = 3


class Difference(NamedTuple):
    """Mean over seeds, 95 % interval of the mean, verdict."""

    mean: float
    interval: tuple[float, float]
    verdict: str


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t interval of the mean; infinite for a single value."""
    from scipy.stats import t

    a = np.asarray(values, dtype=float)
    if len(a) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(a) - 1) * a.std(ddof=1) / math.sqrt(len(a)))
    return float(a.mean()) - half, float(a.mean()) + half


def judge(values: Sequence[float], effect: float) -> Difference:
    """Verdict on differences, a value a seed, in the direction of the claim (above 0 supports it)."""
    low, high = t_interval(values)
    return Difference(
        float(np.mean(values)), (low, high), decide(float(np.mean(values)), low, high, effect, len(values))
    )


def decide(mean: float, low: float, high: float, effect: float, seeds: int = MIN_SEEDS) -> str:
    """The rule in the head of this file, for an interval that came from elsewhere (a bootstrap)."""
    if seeds < MIN_SEEDS:
        return "underpowered"
    if low > 0 and mean >= effect:
        return "holds"
    return "does not hold" if high < effect else "underpowered"


class Report:
    """Collects claims, prints each as it is decided, and ends with the JSON line (and `--out FILE`)."""

    def __init__(self, paper: str, out: str | None = None) -> None:
        self.paper, self._out = paper, out
        self.claims: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}
        self._started = time.time()

    def claim(
        self,
        name: str,
        found: Difference,
        *,
        seeds: int,
        why: str,
        paper_figure: Any = None,
        ours: Any = None,
    ) -> None:
        """`ours` defaults to the mean difference; `paper_figure` is None where the paper gives none."""
        row = {
            "id": name, "paper_figure": paper_figure, "ours": ours if ours is not None else found.mean,
            "interval": list(found.interval), "seeds": seeds, "verdict": found.verdict, "why": why,
        }  # fmt: skip
        self.claims.append(row)
        low, high = found.interval
        print(
            f"{name}: {found.verdict}: {found.mean:.4g} [{low:.4g}, {high:.4g}], {seeds} seeds; {why}",
            flush=True,
        )

    def earlier(self, file: str) -> list[dict[str, Any]]:
        """Take the values of an earlier output, to judge them again; returns its claims."""
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if found.get("paper") != self.paper:
            raise UsageError(f"{file} is an output of {found.get('paper')!r}, not of {self.paper!r}")
        self.data = found["data"]
        self._started -= found["seconds"]
        return found["claims"]

    def keep(self, claims: list[dict[str, Any]]) -> None:
        """Claims of the earlier output that nothing here has judged again."""
        known = {c["id"] for c in self.claims}
        self.claims += [c for c in claims if c["id"] not in known]

    def finish(self) -> None:
        """Print (and write) the result."""
        seconds = round(time.time() - self._started)
        result = _plain({"paper": self.paper, "claims": self.claims, "data": self.data, "seconds": seconds})
        print("GPU: not measured" if not torch.cuda.is_available() else torch.cuda.get_device_name())
        print(json.dumps(result), flush=True)
        if self._out:
            Path(self._out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON without infinities, floats to six digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def arguments(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """--workspace, --out, --full, --seeds, --steps and --batch; `defaults` sets theirs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workspace", default="workspace", help="where the activation store is (nothing is written there)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--full",
        action="store_true",
        help="more steps, seeds or axes (the script's head says which): about an hour",
    )
    parser.add_argument("--seeds", type=int, help="number of seeds (3; with --full what the head says)")
    parser.add_argument("--steps", type=int, help="training steps on the store")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a step")
    parser.set_defaults(**defaults)
    return parser


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, full_seeds: int = 3
) -> argparse.Namespace:
    """Arguments with the defaults that depend on --full."""
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (full_seeds if args.full else 3)
    return args


@contextmanager
def scratch_store(workspace: str) -> Iterator[ActivationStore]:
    """The newest store of a workspace, opened in a temporary workspace that links to it and takes all that is written."""
    root = workspace_path(workspace, create=False)
    if not ActivationStore.find_all(root):
        raise MissingDataError(
            f"no store in {root}: run `atomscope demo --no-serve` or `atomscope harvest` first"
        )
    with tempfile.TemporaryDirectory(prefix="claims-") as folder:
        for name in ("activations", "corpora", "assets"):
            if (root / name).is_dir():
                (Path(folder) / name).symlink_to((root / name).resolve())
        found = ActivationStore.find_all(folder)
        newest = max(found, key=lambda p: (p / "store.json").stat().st_mtime)
        store = ActivationStore.open(newest)
        store.path = newest  # unresolved: what is made from the store lands in the temporary workspace
        yield store


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny SAEs: a second thread costs more in barriers than it computes, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def heldout_rows(store: ActivationStore, hook: str, limit: int = 40_000) -> torch.Tensor:
    """Held-out rows without position 0 and without later attention sinks, `[n, d_model]`."""
    mean_norm = store.stats(hook, split="train", skip="first").mean_norm
    parts, n = [], 0
    for batch in store.sequential(hook, batch_size=8192, split="heldout", skip="first"):
        x = batch.x[hook]
        parts.append(x[x.norm(dim=1) <= SINK_RATIO * mean_norm])
        n += len(parts[-1])
        if n >= limit:
            break
    return torch.cat(parts)[:limit]


@torch.no_grad()
def quality(sae: Any, x: torch.Tensor) -> dict[str, float]:
    """fvu, l0 and the share of latents alive on rows x."""
    sums, fired = Reconstruction(x.shape[1]), torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for rows in x.split(8192):
        codes = sae.encode(rows)
        sums.add(rows, sae.decode(codes), codes)
        fired[codes.indices[codes.values != 0].long().unique().cpu()] = True
    values = sums.values()
    return {"fvu": values["fvu"], "l0": values["l0"], "alive": float(fired.float().mean())}


def at_l0(points: Sequence[tuple[float, float]], l0: float) -> float:
    """FVU at an L0 from (L0, FVU) points: linear in the logarithms between neighbours, NaN outside them."""
    x, y = (np.log(np.asarray(c, dtype=float)) for c in zip(*sorted(points), strict=True))
    inside = x[0] - 1e-9 <= math.log(l0) <= x[-1] + 1e-9
    return float(np.exp(np.interp(math.log(l0), x, y))) if inside else math.nan
