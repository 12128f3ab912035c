"""Quality against the peer: the L0 - delta-CE frontier of our TopK beside that of SAELens's TopK trainer.

Protocol, written before the run. Same store, same rows in the same order, same number of tokens, batch, warm-up,
decay, dead window and seeds. SAELens trains with its own TopKTrainingSAE and SAETrainer (inputs normalised to norm
sqrt(d) as it recommends, its own AuxK), fed from the store's stream. Learning rate of both: the one of GRID with
the least held-out FVU at k = 32, seed 0; where it stands at an end of the grid, the next factor of 2 is tried too.
Then k = 16, 32, 64 and seeds 0, 1, 2 at d_sae 2,304. Judged on held-out contexts: delta CE in nats (the
reconstruction in the hook's place, position 0 left alone) and FVU of held-out rows.
Effect: ours - theirs, paired by context, 95 % interval of 1,000 resamples of contexts. A seed holds where no k has a
delta CE whose interval lies above 0; the claim holds where every seed does.

    python benchmarks/frontier_saelens.py --workspace PATH --full
    python benchmarks/frontier_saelens.py --workspace PATH --steps 20 --ks 32 --seeds 0 --max-tokens 600
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.lookup import open_store
from cache import load_model
from saes import TrainConfig, presets, train
from saes.metrics import bootstrap
from saes.predictions import clean_contexts, context_sums, heldout_batches, scored_logits

GRID = (1.6e-3, 3.2e-3, 6.4e-3)
AUX_WINDOW_TOKENS = 100_000
TUNE_K, TUNE_SEED = 32, 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides are given."""

    store: Any
    hook: str
    d_sae: int
    steps: int
    batch_size: int
    keep: Path
    """What has been trained stays here, so that a run that was stopped goes on."""

    def schedule(self, seed: int, lr: float) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch_size=self.batch_size, lr=lr, seed=seed, warmup_steps=50, decay_fraction=0.2,
            dead_window_tokens=AUX_WINDOW_TOKENS, log_every=self.steps, checkpoint_seconds=1e9,
        )  # fmt: skip


class Subject:
    """x -> (x_hat, codes): what the splice asks for."""

    def __init__(self, sae: Any, peer: bool) -> None:
        self.sae, self.peer = sae, peer

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        codes = self.sae.encode(x)
        return self.sae.decode(codes), codes

    def l0(self, codes: Any) -> Tensor:
        return (codes if self.peer else codes.values) != 0


def ours(job: Job, ks: list[int], seed: int, lr: float) -> dict[int, Subject]:
    """All k at once from one pass, as `train` is used."""
    configs = [presets.topk(d_sae=job.d_sae, k=k) for k in ks]
    results = train(job.store, configs, job.schedule(seed, lr), hook=job.hook, workspace=job.keep)
    return {k: Subject(r.sae, peer=False) for k, r in zip(ks, results, strict=True)}


def theirs(job: Job, k: int, seed: int, lr: float) -> Subject:
    """SAELens's own trainer on the same stream; its defaults where the job does not name a value."""
    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kept = job.keep / f"saelens-{job.d_sae}-k{k}-seed{seed}-lr{lr}-{job.steps}x{job.batch_size}"
    if (kept / "cfg.json").exists():
        return Subject(SAE.load_from_disk(kept), peer=True)
    torch.manual_seed(seed)
    schedule, d = job.schedule(seed, lr), job.store.d(job.hook)
    cfg = TopKTrainingSAEConfig(
        d_in=d, d_sae=job.d_sae, k=k, normalize_activations="expected_average_only_in", device="cpu"
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=job.steps * job.batch_size, train_batch_size_samples=job.batch_size,
            lr=lr, lr_end=lr,
            lr_warm_up_steps=min(schedule.warmup_steps, job.steps // 10), lr_decay_steps=job.steps // 5,
            dead_feature_window=max(1, AUX_WINDOW_TOKENS // job.batch_size), device="cpu",
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=8,
        ),
        TopKTrainingSAE(cfg), data_provider=_rows(job, seed),
    )  # fmt: skip
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        # the scale comes from batches of its own, so that training sees the stream from its start
        trainer.activation_scaler.estimate_scaling_factor(d, _rows(job, seed), 8)
        sae = trainer.fit().eval()
    sae.save_inference_model(kept)
    return Subject(SAE.load_from_disk(kept), peer=True)


def _rows(job: Job, seed: int) -> Iterator[Tensor]:
    stream = job.store.stream(job.hook, batch_size=job.batch_size, seed=seed, split="train", skip="first")
    try:
        for batch in stream:
            yield batch.x[job.hook].clone()
    finally:
        stream.close()


@torch.no_grad()
def fvu_and_l0(job: Job, subject: Subject) -> tuple[float, float]:
    """On held-out rows without position 0."""
    mean = torch.as_tensor(job.store.stats(job.hook, split="train", skip="first").mean).float()
    error = spread = fired = n = 0.0
    for batch in job.store.sequential(job.hook, batch_size=4096, split="heldout", skip="first"):
        x = batch.x[job.hook]
        x_hat, codes = subject(x)
        error += (x - x_hat).double().pow(2).sum().item()
        spread += (x - mean).double().pow(2).sum().item()
        fired += subject.l0(codes).sum().item()
        n += len(x)
    return error / spread, fired / n


def tune(name: str, job: Job, fit: Any) -> tuple[float, dict[float, float]]:
    """Learning rate of least held-out FVU, and what was tried; the grid grows past an end that is best."""
    tried: dict[float, float] = {}

    def attempt(lr: float) -> None:
        started = time.perf_counter()
        tried[lr] = fvu_and_l0(job, fit(lr))[0]
        say(f"tune {name}: lr {lr:.1e} held-out FVU {tried[lr]:.4f} ({time.perf_counter() - started:.0f} s)")

    for lr in GRID:
        attempt(lr)
    best = min(tried, key=tried.__getitem__)
    if best in (GRID[0], GRID[-1]):
        attempt(best / 2 if best == GRID[0] else best * 2)
    return min(tried, key=tried.__getitem__), tried


@torch.inference_mode()
def losses(job: Job, subjects: dict[Any, Subject], model: Any, max_tokens: int) -> dict[Any, np.ndarray]:
    """(targets, summed cross-entropy, KL) of each held-out context for each subject, and for the clean model (None)."""
    sums: dict[Any, list[np.ndarray]] = {key: [] for key in (None, *subjects)}
    for ids, mask in heldout_batches(job.store.corpus, max_tokens):
        clean: Any = None
        for key in sums:
            logits = scored_logits(model, ids, mask, job.hook, subjects.get(key))
            clean = clean or clean_contexts(logits, ids, mask)
            sums[key] += context_sums(logits, clean)
    return {key: np.stack(parts) for key, parts in sums.items()}


def compare(sums: dict[Any, np.ndarray], seed: int, k: int) -> dict[str, Any]:
    """delta CE of both, and the paired difference with its interval over contexts."""
    clean, mine, peer = sums[None], sums["ours", seed, k], sums["saelens", seed, k]
    table = np.column_stack([clean[:, 0], clean[:, 1], mine[:, 1], peer[:, 1]])
    n, base, a, b = table.sum(0)
    low, high = bootstrap(table, lambda t: (t[..., 2] - t[..., 3]) / t[..., 0])
    return {"ours": round((a - base) / n, 4), "saelens": round((b - base) / n, 4),
            "difference": round((a - b) / n, 4), "interval": [round(low, 4), round(high, 4)]}  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, default=None)
    parser.add_argument("--store", default="latest")
    parser.add_argument(
        "--keep", type=Path, default=None, help="folder of trained SAEs, to go on after a stop"
    )
    parser.add_argument("--full", action="store_true", help="the registered run; other sizes are for trying")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=3000, help="held-out tokens for delta CE")
    args = parser.parse_args()
    if args.full:
        given = {"--workspace": args.workspace, "--keep": args.keep, "--store": args.store}
        args = parser.parse_args(["--full", *(str(t) for pair in given.items() if pair[1] for t in pair)])
    started = time.perf_counter()
    store = open_store(args.store, args.workspace)
    job = Job(
        store=store, hook=store.hooks[0], d_sae=args.d_sae, steps=args.steps, batch_size=args.batch_size,
        keep=args.keep or Path(tempfile.mkdtemp(prefix="frontier-")),
    )  # fmt: skip
    say(f"{job.hook}, {store.n_rows(job.hook):,} rows, {job.steps * job.batch_size:,} tokens a run, "
        f"d_sae {job.d_sae}, {torch.get_num_threads()} threads")  # fmt: skip
    lr_peer, tried_peer = tune("saelens", job, lambda lr: theirs(job, TUNE_K, TUNE_SEED, lr))
    lr_ours, tried_ours = tune("ours", job, lambda lr: ours(job, [TUNE_K], TUNE_SEED, lr)[TUNE_K])
    subjects: dict[Any, Subject] = {}
    for seed in args.seeds:
        for k, subject in ours(job, args.ks, seed, lr_ours).items():
            subjects["ours", seed, k] = subject
        for k in args.ks:
            subjects["saelens", seed, k] = theirs(job, k, seed, lr_peer)
        say(f"seed {seed} trained, {time.perf_counter() - started:.0f} s since the start")
    reconstruction = {key: fvu_and_l0(job, s) for key, s in subjects.items()}
    model = load_model(store.model_source, workspace=store.workspace)
    sums = losses(job, subjects, model, args.max_tokens)
    rows = [
        {"seed": seed, "k": k, **compare(sums, seed, k)}
        | {f"fvu_{side}": round(reconstruction[side, seed, k][0], 4) for side in ("ours", "saelens")}
        | {f"l0_{side}": round(reconstruction[side, seed, k][1], 2) for side in ("ours", "saelens")}
        for seed in args.seeds for k in args.ks
    ]  # fmt: skip
    for r in rows:
        say(f"seed {r['seed']} k {r['k']:>2}: delta CE {r['ours']:.4f} against {r['saelens']:.4f}, difference "
            f"{r['difference']:+.4f} [{r['interval'][0]:+.4f}, {r['interval'][1]:+.4f}]; FVU {r['fvu_ours']:.4f} "
            f"against {r['fvu_saelens']:.4f}; L0 {r['l0_ours']:.1f} against {r['l0_saelens']:.1f}")  # fmt: skip
    worse = sorted({r["seed"] for r in rows if r["interval"][0] > 0})
    print(json.dumps({
        "claim": "L0 - delta CE frontier no worse than SAELens's TopK with tuned lr", "rows": rows,
        "lr": {"ours": lr_ours, "saelens": lr_peer},
        "tried_fvu": {"ours": tried_ours, "saelens": tried_peer}, "seeds": args.seeds, "worse_on_seeds": worse,
        "verdict": "does not hold" if worse else "holds", "contexts": len(sums[None]),
        "seconds": round(time.perf_counter() - started),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
