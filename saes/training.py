"""`train`: many SAEs from one pass over the data, resumable, in a run folder named for what determines its bytes.

    saes/<run>/run.json                config, provenance, status
    saes/<run>/<i>-<name>/             the folded SAE in SAELens's layout
    saes/<run>/metrics/part-*.parquet  one row per SAE and logged step
    saes/<run>/checkpoints/            unfolded state, removed when the run has finished

The same call again finds the finished run and loads it, or goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache.errors import AtomscopeError, DataError, UsageError
from cache.progress import Bar, progress
from cache.provenance import provenance
from cache.workspace import canonical_json, read_json, workspace_path, write_json
from saes import warm_start as warm_starts
from saes.aip import SecondMoment, estimate_rows, second_moment
from saes.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from saes.config import SAEConfig, TrainConfig
from saes.conventions import of_training
from saes.gba import warning as gba_warning
from saes.run_log import Listener, MetricsLog
from saes.sae import SAE
from saes.sources import RingSource, Rows, Source, StoreSource, TensorSource
from saes.trainer import Trainer
from saes.wandb_log import wandb_log
from saes.warm_start import WarmStart

SAMPLE_ROWS = 16_384


@dataclass(frozen=True)
class TrainResult:
    """A trained, folded SAE; the folder it was saved to (None without a workspace); its logged metrics, a row a step."""

    sae: SAE
    path: Path | None
    metrics: list[dict[str, Any]]


def train(
    data: Any,
    saes: Sequence[SAEConfig],
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

    With `out_hook`, or on two tensors (x `[N, d_model]`, target `[N, d_out]`), they are transcoders: from the rows at
    `hook` they predict those of the same tokens at `out_hook`. `warm_start` is an SAE (or where one is) whose weights they
    all start from, or one or None for each (saes/warm_start.py).
    A store's or ring's run is kept in its workspace; a tensor's only if `workspace` is given. Returns folded SAEs in
    the order of `saes`. `wandb` names a W&B project that gets the metrics too. Raises UsageError on a bad combination,
    DataError on NaN in data or loss, and KeyboardInterrupt after writing a checkpoint; the same call then goes on
    where it was.
    """
    config = config or TrainConfig()
    source = _source(data, hook, out_hook)
    configs = [_bind(c, source) for c in saes]
    if not configs:
        raise UsageError("train needs at least one SAEConfig, for example presets.topk(d_sae=4096, k=32)")
    root = workspace_path(workspace) if workspace is not None else getattr(data, "workspace", None)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check_data_path(configs, config, source)
    warm = warm_starts.resolve(warm_start, configs)
    run = None if root is None else Path(root) / "saes" / run_name(configs, config, source, warm)
    if run is not None and (done := load_run(run)) is not None:
        return done
    described = warm_starts.described(warm, warm_start)
    with wandb_log(
        wandb, run_name(configs, config, source, warm), _record(source, configs, config)
    ) as listener:
        return _run(source, configs, config, run, device, warm, described, listener)


def _source(data: Any, hook: str | None, out_hook: str | None) -> Source:
    if isinstance(data, Tensor | tuple):
        if out_hook is not None:
            raise UsageError("tensors have no hooks: train a transcoder on two tensors (x, target)")
        if isinstance(data, tuple) and len(data) != 2:
            raise UsageError(f"{len(data)} tensors were given: one trains SAEs, two (x, target) transcoders")
        return TensorSource(data) if isinstance(data, Tensor) else TensorSource(*data)
    from cache.ring import Ring

    hook = hook or (data.hooks[0] if len(data.hooks) == 1 else None)
    if hook is None:
        raise UsageError(f"this store has several hooks, say which: hook= one of {', '.join(data.hooks)}")
    if out_hook == hook:
        raise UsageError(f"out_hook is the input's own hook {hook}: leave it out to train SAEs")
    return (RingSource if isinstance(data, Ring) else StoreSource)(data, hook, out_hook)


def _bind(cfg: SAEConfig, source: Source) -> SAEConfig:
    """Fill in what the data fixes; refuse a config made for another width."""
    if cfg.d_model not in (0, source.d_model):
        raise DataError(
            f"SAE {cfg.label} has d_model={cfg.d_model}, the activations of "
            f"{source.provenance['hook'] or 'the tensor'} have {source.d_model}: train it on the hook it was made for"
        )
    p = source.provenance
    if (cfg.d_out or cfg.out_hook) and (cfg.d_out, cfg.out_hook) != (source.d_out, p.get("out_hook", "")):
        raise DataError(
            f"SAE {cfg.label} predicts {cfg.out_hook or 'rows'} of width {cfg.d_out or 'unknown'}, the data has "
            f"{p.get('out_hook') or 'no out_hook'}: give train the out_hook it was made for"
        )
    made_for = {"hook": p["hook"], "out_hook": p.get("out_hook", ""), "d_out": source.d_out}
    return replace(cfg, d_model=source.d_model, model=p["model"], model_sha=p["model_sha"], **made_for)


def _check_data_path(configs: Sequence[SAEConfig], config: TrainConfig, source: Source) -> None:
    """FAST is a data path: refuse rows that did not come along it."""
    fast = [c.label for c in configs if c.data == "fast"]
    if not fast:
        return
    mode = getattr(source, "mode", None)
    if mode != "dialogue":
        raise UsageError(
            f"{fast[0]} trains on dialogues that each ran alone, this data is {mode or 'a tensor'}: "
            "build a corpus with mode='dialogue' and harvest it"
        )
    if config.skip is not None:
        raise UsageError(
            f"{fast[0]} trains on every row of a dialogue: set skip=None (now {config.skip!r}), "
            "or data='any' to leave rows out"
        )


def run_name(
    configs: Sequence[SAEConfig], config: TrainConfig, source: Source, warm: Sequence[SAE | None] = ()
) -> str:
    """`<label>-<hash>`: the hash covers the configs, the data and the SAEs started from: equal runs share a folder."""
    schedule = {k: v for k, v in config.to_dict().items() if k != "checkpoint_seconds"}
    key: dict[str, Any] = {
        "saes": [c.to_dict() for c in configs],
        "train": schedule,
        "data": source.provenance,
    }
    if any(warm):
        key["warm_start"] = [None if s is None else s.sae_id for s in warm]
    digest = hashlib.sha256(canonical_json(key).encode()).hexdigest()[:8]
    more = f"-and-{len(configs) - 1}-more" if len(configs) > 1 else ""
    return f"{configs[0].label}{more}-{digest}"


def load_run(run: Path) -> list[TrainResult] | None:
    """Results of a finished run, or None where it has not finished."""
    if not (run / "run.json").is_file():
        return None
    record = read_json(run / "run.json")
    if record["status"] != "finished":
        return None
    rows = [
        r
        for part in sorted((run / "metrics").glob("part-*.parquet"))
        for r in pq.read_table(part).to_pylist()
    ]
    return [
        TrainResult(SAE.load(run / name), run / name, [r for r in rows if r["sae"] == i])
        for i, name in enumerate(record["saes"])
    ]


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
    moments = (source.moments(config), device, source.target_moments(config))
    trainers = [Trainer(c, config, *moments) for c in configs]
    log = MetricsLog(run, listener)
    checkpoint = latest_checkpoint(run) if run is not None else None
    log.keep_until(checkpoint.step if checkpoint else 0)
    if checkpoint is not None:
        for t, (tensors, state) in zip(trainers, checkpoint.saes, strict=True):
            t.load(tensors, state)
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
    first = checkpoint.step if checkpoint else 0
    record = _record(source, configs, config) | ({"warm_start": started_from} if any(warm) else {})
    for t in trainers:
        if t.bias is not None:
            print(f"{t.cfg.label}: {t.bias.groups}", file=sys.stderr, flush=True)
    if run is not None:
        write_json(run / "run.json", record | {"status": "running", "step": first})
    stream = source.stream(config, checkpoint.stream if checkpoint else None, device)
    try:
        _loop(trainers, stream, config, run, log, first)
    finally:
        stream.close()
    rules = [None if t.bias is None else t.bias.record(config.steps) for t in trainers]
    for t, rule in zip(trainers, rules, strict=True):
        if rule is not None and (line := gba_warning(t.cfg.label, rule)) is not None:
            print(line, file=sys.stderr, flush=True)
    results = []
    check = _sample(source, config, device) if any(t.checks_rows for t in trainers) else None
    for i, t in enumerate(trainers):
        sae = t.finish(None if check is None else check.x)
        own = [r for r in log.rows if r["sae"] == i]
        sae.conventions = of_training(source, config.skip, own[-1]["l0"] if own else None)
        path = sae.save(run / _folder(i, t.cfg)) if run is not None else None
        if path is not None and t.aip is not None:
            t.aip.save(path)
        results.append(TrainResult(sae, path, own))
    if run is not None:
        wall = record | {
            "status": "finished",
            "step": config.steps,
            "provenance": provenance(started=started),
            "bias_rules": rules,
        }
        write_json(
            run / "run.json", wall | {"device": str(device), "screen": [t.screen.state() for t in trainers]}
        )
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return results


def _sample(source: Source, config: TrainConfig, device: torch.device) -> Rows:
    """The first SAMPLE_ROWS rows of a stream of its own, so that training sees the data from its start."""
    stream = source.stream(config, None, device)
    xs: list[Tensor] = []
    targets: list[Tensor] = []
    try:
        for batch in stream:
            xs.append(batch.x.clone())
            if batch.target is not None:
                targets.append(batch.target.clone())
            if sum(map(len, xs)) >= SAMPLE_ROWS:
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
    trainers: list[Trainer], stream: Any, config: TrainConfig, run: Path | None, log: MetricsLog, first: int
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
            for t in trainers:
                t.step(rows.x, step, rows.target)
            done = step + 1
            bar.advance(len(rows.x))
            if done % config.log_every == 0 or done == config.steps:
                rate = (done - first) * config.batch_size / (time.monotonic() - start)
                _log(trainers, config, step, rate, log, bar, run)
            if run is not None and (stop.is_set() or time.monotonic() - saved > config.checkpoint_seconds):
                _save(trainers, stream, config, run, log, done)
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt
    log.flush(config.steps)


def _save(
    trainers: list[Trainer], stream: Any, config: TrainConfig, run: Path, log: MetricsLog, done: int
) -> None:
    """A checkpoint after `done` steps; never of a state that has gone wrong since the last logged step."""
    for t in trainers:
        if not torch.isfinite(t.running_sums).all():
            raise _not_finite("the loss", done, t, config, run)
    log.flush(done)
    state = [(t.tensors(), t.state()) for t in trainers]
    save_checkpoint(run, Checkpoint(done, stream.state_dict(), state))


def _not_finite(what: str, step: int, t: Trainer, config: TrainConfig, run: Path | None) -> DataError:
    return DataError(
        f"{what} is not finite at step {step} of SAE {t.cfg.label}: lower lr "
        f"(now {config.peak_lr(t.cfg.d_sae, t.cfg.lr):.2g}); last good state: {_last_good(run)}"
    )


def _log(
    trainers: list[Trainer],
    config: TrainConfig,
    step: int,
    rate: float,
    log: MetricsLog,
    bar: Bar,
    run: Path | None,
) -> None:
    for i, t in enumerate(trainers):
        row = t.metrics()
        bad = [k for k, v in row.items() if not v < float("inf")]
        if bad:
            raise _not_finite(", ".join(bad), step + 1, t, config, run)
        lr = config.lr_at(step, t.cfg.d_sae, t.cfg.lr)
        log.add(
            {"sae": i, "step": step + 1, "tokens": (step + 1) * config.batch_size, "lr": lr, "rate": rate}
            | row
        )
    bar.note("  ".join(f"fvu {r['fvu']:.3f} dead {r['n_dead']:.0f}" for r in log.rows[-len(trainers) :]))


def _last_good(run: Path | None) -> str:
    checkpoint = latest_checkpoint(run) if run is not None else None
    return f"checkpoint of step {checkpoint.step} in {run}" if checkpoint else "none was written yet"


def _record(source: Source, configs: list[SAEConfig], config: TrainConfig) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "saes": [_folder(i, c) for i, c in enumerate(configs)],
        "configs": [c.to_dict() for c in configs],
        "train": config.to_dict(),
        "data": source.provenance,
        "tokens": config.steps * config.batch_size,
        "provenance": provenance(),
    }


def _folder(i: int, cfg: SAEConfig) -> str:
    return f"{i}-{cfg.label}"


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
