"""`matched_topk`: the control of `evaluate_atoms` that is trained: a plain TopK SAE of an SAE's own width and L0.

    k          mean L0 of the SAE on rows of the kind that it is trained on (up to LEVEL_ROWS), rounded, at least 1
    schedule   that of the SAE's own run (steps, batch, seed, learning rate, rows), found by its sae_id in the workspace;
               DEFAULT where no run is known, as of an SAE from elsewhere

It is an ordinary run of the store's workspace, `saes/control-topk-<d_sae>-k<k>-<hash>/`: it resumes, and is found again
once it has finished. `latest` never means an SAE whose name begins with `presets.CONTROL`.
"""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cache.errors import AtomscopeError, DataError, UsageError
from cache.progress import progress
from cache.workspace import read_json
from saes.binding import bind, open_source
from saes.checkpoint import latest_step
from saes.config import SAEConfig
from saes.evaluation import check_fit
from saes.presets import CONTROL, topk
from saes.runs import RECORD, Diverged, load_run, run_name
from saes.sae import SAE
from saes.train_config import TrainConfig
from saes.training import train

LEVEL_ROWS = 50_000
BATCH_ROWS = 4096
DEFAULT = TrainConfig(steps=1500, batch_size=2048, warmup_steps=50, dead_window_tokens=100_000)
"""Schedule where that of the SAE is not known: 3.1M rows of the store's training documents."""


class Control(NamedTuple):
    """The control and what it is matched to."""

    sae: SAE
    k: int
    l0: float
    """Mean L0 of the SAE that it stands beside, on training rows."""


class _OwnRun(NamedTuple):
    folder: Path
    config: SAEConfig
    schedule: TrainConfig


def matched_topk(sae: SAE, store: Any) -> Control | None:
    """Train, go on with, or find the TopK SAE that stands beside `sae`; None where `sae` is a plain TopK SAE itself.

    Says on stderr what it will do first. Raises DataError where the SAE does not fit the store or the control diverges,
    and KeyboardInterrupt after a checkpoint is written: the same call then goes on.
    """
    if sae.cfg.transcoder:
        raise UsageError(f"{sae.cfg.label} is a transcoder: a TopK control is for SAEs")
    hook, own = check_fit(sae, store), _own_run(sae, store.workspace)
    if _plain_topk(sae.cfg if own is None else own.config):
        _say("no TopK control: the SAE is a plain TopK SAE itself")
        return None
    schedule = DEFAULT if own is None else own.schedule
    l0, n = mean_l0(sae, store, hook, schedule)
    k = min(max(1, round(l0)), sae.cfg.d_sae)
    lr = own.config.lr if own else None  # an SAE may have one of its own, which goes before the schedule's
    cfg = topk(d_sae=sae.cfg.d_sae, k=k, lr=lr, name=f"{CONTROL}topk-{sae.cfg.d_sae}-k{k}")
    source = open_source(store, hook, None)
    run = store.workspace / "saes" / run_name([bind(cfg, source)], schedule, source)
    done = load_run(run)
    what = f"TopK control: k {k} for a mean L0 of {l0:.1f} on {n:,} training rows, {sae.cfg.d_sae:,} latents"
    if done is not None:
        _say(f"{what}: there already, {run.name}")
        return Control(done[0].sae, k, l0)
    _say(f"{what}: {_work(run, schedule)}, {_reason(own, store)} (topk=False, --no-topk: without it)")
    try:
        result = train(store, cfg, schedule, hook=hook, device=sae.W_enc.device)[0]
    except Diverged as e:
        raise DataError(f"the TopK control diverged: leave it out, topk=False or --no-topk ({e})") from e
    return Control(result.sae, k, l0)


@torch.no_grad()
def mean_l0(sae: SAE, store: Any, hook: str, schedule: TrainConfig) -> tuple[float, int]:
    """Mean L0 of the rows that this schedule trains on, and of how many: all, or about LEVEL_ROWS as the stream mixes them."""
    total = n = 0
    options: dict[str, Any] = {"split": schedule.split, "skip": schedule.skip, "epochs": 1}
    with (
        closing(store.stream(hook, batch_size=BATCH_ROWS, **options)) as stream,
        progress("L0 of training rows", min(stream.rows_per_epoch, LEVEL_ROWS), unit="tok") as bar,
    ):
        for batch in stream:
            codes = sae.encode(batch.x[hook].to(sae.W_enc.device))
            total, n = total + int(codes.l0().sum()), n + codes.n_rows
            bar.advance(codes.n_rows)
            if n >= LEVEL_ROWS:
                break
    return total / max(n, 1), n


def _own_run(sae: SAE, workspace: Path) -> _OwnRun | None:
    """The run in this workspace that made the SAE, by its sae_id; None where there is none, or it was imported."""
    for path in sorted(workspace.glob("saes/*/*/cfg.json")):
        with suppress(AtomscopeError, KeyError, TypeError, IndexError, ValueError):
            if read_json(path)["metadata"]["sae_id"] != sae.sae_id:
                continue
            record = read_json(path.parent.parent / RECORD)
            config = SAEConfig.from_dict(record["configs"][record["saes"].index(path.parent.name)])
            return _OwnRun(path.parent.parent, config, TrainConfig.from_dict(record["train"]))
    return None


def _plain_topk(cfg: SAEConfig) -> bool:
    """TopK on rows as they are, without a further term."""
    return (
        cfg.activation == "topk"
        and cfg.space in ("raw", "scalar")
        and not (cfg.matryoshka or cfg.separability)
    )


def _work(run: Path, schedule: TrainConfig) -> str:
    begun = latest_step(run)
    rows = f"{schedule.steps:,} steps of {schedule.batch_size:,} rows ({schedule.steps * schedule.batch_size:,} in all)"
    return f"going on at step {begun:,} of {rows}" if begun else f"to be trained in {rows}"


def _reason(own: _OwnRun | None, store: Any) -> str:
    if own is None:
        return "the default schedule, as the SAE's own run is not in this workspace"
    trained_on = read_json(own.folder / RECORD).get("data", {}).get("store")
    other = "" if trained_on == store.path.name else f", which was trained on {trained_on or 'other rows'}"
    return f"the schedule of {own.folder.name}{other}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
