"""`train`: many SAEs from one pass over the data, resumable, in a run folder named for what determines its bytes.

    saes/<run>/run.json                config, provenance, status
    saes/<run>/<i>-<name>/             the folded SAE in SAELens's layout
    saes/<run>/metrics/part-*.parquet  one row per SAE and logged step
    saes/<run>/checkpoints/            unfolded state, removed when the run has finished

The same call again finds the finished run and loads it, or goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.errors import AtomscopeError
from cache.progress import Bar, progress
from cache.provenance import provenance
from cache.workspace import workspace_path, write_json
from saes import footprint
from saes import warm_start as warm_starts
from saes.aip import SecondMoment, estimate_rows, second_moment
from saes.binding import bind, check_data_path, open_source
from saes.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from saes.config import SAEConfig
from saes.conventions import of_training
from saes.divergence import Together
from saes.gba import warning as gba_warning
from saes.run_log import Listener, MetricsLog
from saes.runs import RECORD, TrainResult, claimed, folder_of, load_run, new_record, run_name
from saes.sae import SAE
from saes.sources import Rows, Source, training_arguments
from saes.top_products import Scratch
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from saes.wandb_log import wandb_log
from saes.warm_start import WarmStart

SAMPLE_ROWS = 16_384


def train(
    data: Any,
    saes: Sequence[SAEConfig] | SAEConfig,
    config: TrainConfig | None = None,
    *,
    hook: str | None = None,
    out_hook: str | None = None,
    warm_start: WarmStart | Sequence[WarmStart] = None,
    workspace: str | Path | None = None,
    device: str | torch.device | None = None,
    wandb: str | None = None,
) -> list[TrainResult]:
    """Train SAEs together on an `ActivationStore` or a `harvest_ring` (with `hook`), or on a tensor `[N, d_model]`.

    A tensor may be a numpy array, and then `hook` only says where its rows are from; `saes` may be one config. With
    `out_hook`, or on two tensors (x `[N, d_model]`, target `[N, d_out]`), they are transcoders: from the rows at `hook` they
    predict those of the same tokens at `out_hook`. `warm_start` is an SAE (or where one is) whose weights they all start
    from, or one or None for each (saes/warm_start.py).
    A store's or ring's run is kept in its workspace; a tensor's only if `workspace` is given. Returns folded SAEs in
    the order of `saes`; one that diverged beside others is taken out and has `failed` set. `wandb` names a W&B project that
    gets the metrics too. Raises UsageError on a bad combination, DataError on NaN in data or where every SAE has diverged,
    AtomscopeError where another process trains the same run, and KeyboardInterrupt after writing a checkpoint; the same
    call then goes on where it was.
    """
    saes, config, device = training_arguments(saes, config, device)
    source = open_source(data, hook, out_hook)
    configs = [bind(c, source) for c in saes]
    root = workspace_path(workspace) if workspace is not None else getattr(data, "workspace", None)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_data_path(configs, config, source)
    if hasattr(source, "ring_window"):  # the ring's own, and part of its name
        config = replace(config, window=TrainConfig.window)
    warm = warm_starts.resolve(warm_start, configs)
    name = run_name(configs, config, source, warm)
    run = None if root is None else Path(root) / "saes" / name
    if run is not None and (done := load_run(run)) is not None:
        return done
    described = warm_starts.described(warm, warm_start)
    with claimed(run):
        if run is not None and (done := load_run(run)) is not None:
            return done  # another process finished it just before this one got hold of it
        with wandb_log(wandb, name, new_record(source, configs, config)) as listener:
            return _run(source, configs, config, run, device, warm, described, listener)


def _run(
    source: Source,
    configs: list[SAEConfig],
    config: TrainConfig,
    run: Path | None,
    device: torch.device,
    warm: list[SAE | None],
    started_from: list[dict[str, Any] | None],
    listener: Listener | None = None,
) -> list[TrainResult]:
    started = time.time()
    footprint.tell(configs, config, source, device)
    moments = (source.moments(config), device, source.target_moments(config))
    scratch = Scratch()
    trainers = [Trainer(c, config, *moments, scratch) for c in configs]
    group = Together(trainers, config, run)
    log = MetricsLog(run, listener)
    checkpoint = latest_checkpoint(run) if run is not None else None
    log.keep_until(checkpoint.step if checkpoint else 0)
    if checkpoint is not None:
        group.load(checkpoint.saes)
        checkpoint = checkpoint._replace(saes=[])  # each SAE has its own copy now
    else:
        sample = _sample(source, config, device)
        white = _second_moment(source, config, device) if any(c.space == "aip" for c in configs) else None
        for t in trainers:
            if white is not None and t.cfg.space == "aip":
                t.whiten(white.aip(ridge=t.cfg.aip_ridge, centred=t.cfg.aip_centred))
            t.start(sample.x, sample.target)
        for t, sae in zip(trainers, warm, strict=True):
            if sae is not None:
                warm_starts.warm_start(t, sae, sample.x)
        del sample  # not to be kept beside the run
    first = checkpoint.step if checkpoint else 0
    record = new_record(source, configs, config) | ({"warm_start": started_from} if any(warm) else {})
    for t in trainers:
        if t.bias is not None:
            print(f"{t.cfg.label}: {t.bias.groups}", file=sys.stderr, flush=True)
    if run is not None:
        write_json(run / RECORD, record | {"status": "running", "step": first, "failed": group.failed})
    stream = source.stream(config, checkpoint.stream if checkpoint else None, device)
    try:
        _loop(group, stream, config, run, log, first)
    finally:
        stream.close()
        del stream  # its windows go before `_finish` opens another one
    rules = _bias_rules(group, config)
    results = _finish(group, source, config, device, log)
    if run is not None:
        end = {
            "status": "finished",
            "step": config.steps,
            "provenance": provenance(started=started),
            "bias_rules": rules,
            "device": str(device),
            "screen": [None if i in group.lost else t.screen.state() for i, t in enumerate(trainers)],
            "failed": group.failed,
        }
        write_json(run / RECORD, record | end)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return results


def _bias_rules(group: Together, config: TrainConfig) -> list[dict[str, Any] | None]:
    """Of each SAE what its bias rule has reached, None without one; warns of a rule that has not converged."""
    rules: list[dict[str, Any] | None] = [None] * len(group.trainers)
    for i, t in group.live:
        if t.bias is not None:
            rules[i] = rule = t.bias.record(config.steps)
            if (line := gba_warning(t.cfg.label, rule)) is not None:
                print(line, file=sys.stderr, flush=True)
    return rules


def _finish(
    group: Together, source: Source, config: TrainConfig, device: torch.device, log: MetricsLog
) -> list[TrainResult]:
    """Fold and save the SAEs that are left."""
    results = []
    check = _sample(source, config, device) if any(t.checks_rows for _, t in group.live) else None
    for i, t in enumerate(group.trainers):
        own = [r for r in log.rows if r["sae"] == i]
        if i in group.lost:
            results.append(TrainResult(None, None, own, group.lost[i]["why"]))
            continue
        sae = t.finish(None if check is None else check.x)
        last = own[-1] if own else {"l0": None, "fvu": None}
        # that of normalised or whitened rows, or of some roles alone, says nothing about the rows that a check sees
        usual = t.cfg.space in ("raw", "scalar") and config.skip in (None, "first")
        fvu = last["fvu"] if usual else None
        sae.conventions = of_training(source, config.skip, last["l0"], fvu)
        path = sae.save(group.run / folder_of(i, t.cfg)) if group.run is not None else None
        if path is not None and t.aip is not None:
            t.aip.save(path)
        results.append(TrainResult(sae, path, own))
    return results


def _sample(source: Source, config: TrainConfig, device: torch.device) -> Rows:
    """The first SAMPLE_ROWS rows of a stream of its own, so that training sees the data from its start."""
    stream = source.stream(config, None, device)
    xs: list[Tensor] = []
    targets: list[Tensor] = []
    n = 0
    try:
        for batch in stream:
            xs.append(batch.x.clone())
            if batch.target is not None:
                targets.append(batch.target.clone())
            n += len(batch.x)
            if n >= SAMPLE_ROWS:
                break
    finally:
        stream.close()
    return Rows(torch.cat(xs), torch.cat(targets) if targets else None)


def _second_moment(source: Source, config: TrainConfig, device: torch.device) -> SecondMoment:
    """Of the first rows of a stream of its own; what comes of it stands in the checkpoints."""
    stream = source.stream(config, None, device)
    try:
        wanted = estimate_rows(source.d_model, stream.rows_per_epoch)
        return second_moment((batch.x for batch in stream), source.d_model, wanted)
    finally:
        stream.close()


def _loop(
    group: Together, stream: Any, config: TrainConfig, run: Path | None, log: MetricsLog, first: int
) -> None:
    """The training loop: every SAE takes the same batch; metrics, checkpoints and interrupts hang on its outside."""
    saved, start = time.monotonic(), time.monotonic()
    batches = iter(stream)
    with (
        _stop_signals() as stop,
        progress(
            "train", config.steps * config.batch_size, unit="tok", done=first * config.batch_size
        ) as bar,
    ):
        for step in range(first, config.steps):
            rows = next(batches)
            for _, t in group.live:
                t.step(rows.x, step, rows.target)
            done = step + 1
            bar.advance(len(rows.x))
            if done % config.log_every == 0 or done == config.steps:
                rate = (done - first) * config.batch_size / (time.monotonic() - start)
                _log(group, config, step, rate, log, bar)
            if run is not None and (stop.is_set() or time.monotonic() - saved > config.checkpoint_seconds):
                _save(group, stream, run, log, done)
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt
    log.flush(config.steps)


def _save(group: Together, stream: Any, run: Path, log: MetricsLog, done: int) -> None:
    """A checkpoint after `done` steps; never of a state that has gone wrong since the last logged step."""
    for i, t in group.live:
        if wrong := t.wrong_steps:
            group.drop(i, "the loss", done - wrong + 1, done)
        elif not all(p.isfinite().all() for p in t.sae.parameters()):
            group.drop(i, "a weight", done, done)
    log.flush(done)
    save_checkpoint(run, Checkpoint(done, stream.state_dict(), group.states()))


def _log(group: Together, config: TrainConfig, step: int, rate: float, log: MetricsLog, bar: Bar) -> None:
    """A row for each SAE, but for those whose metrics are not finite: they are taken out."""
    for i, t in group.live:
        wrong, row = t.wrong_steps, t.metrics()
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if bad:
            group.drop(i, ", ".join(bad), step + 1 - max(0, wrong - 1), step + 1)
            continue
        lr = config.lr_at(step, t.cfg.d_sae, t.cfg.lr)
        log.add(
            {"sae": i, "step": step + 1, "tokens": (step + 1) * config.batch_size, "lr": lr, "rate": rate}
            | row
        )
    bar.note("  ".join(f"fvu {r['fvu']:.3f} dead {r['n_dead']:.0f}" for r in log.rows[-len(group.live) :]))


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set an event: the step in hand ends, a checkpoint is written, then the loop stops.

    A second one stops at once: a step may be waiting for a model that fills a ring.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


__all__ = ["AtomscopeError", "TrainResult", "load_run", "run_name", "train"]
