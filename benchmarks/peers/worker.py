"""One trainer in a process of its own, driven by JSON lines: what bench_train.py times in turns with ours.

    {"do": "make", "peer": ..., "data": rows.npy, "d_sae": ..., "k": ..., "lr": ..., "dead": share, "threads": ...}
    {"do": "step"}                      -> {"seconds": one full training step on the next batch}
    {"do": "train", "steps", "every"}   -> {"fvu": [[tokens, held-out fvu], ...]}
    {"do": "memory", "steps"}           -> {"growth": bytes of resident memory that `steps` steps add at their peak}

A step is what the peer's own trainer does for one batch: forward, AuxK, backward, clipping, optimiser, bookkeeping.
Needs torch and the peer only; the peers' libraries do not share an environment with ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import torch

NEVER = 10**15


class Ours:
    """atomscope's Trainer; `screen` is auto or off."""

    def __init__(self, x: torch.Tensor, job: dict[str, Any]) -> None:
        from saes import presets
        from saes.kernels import Dead
        from saes.sources import Moments
        from saes.train_config import TrainConfig
        from saes.trainer import Trainer

        cfg = presets.topk(d_sae=job["d_sae"], k=job["k"], d_model=x.shape[1])
        schedule = TrainConfig(
            steps=10_000, warmup_steps=1, batch_size=job["batch"], lr=job["lr"], screen=job.get("screen", "auto"),
            dead_window_tokens=NEVER,
        )  # fmt: skip
        self.t = Trainer(cfg, schedule, Moments(len(x), x.norm(dim=1).mean().item()), x.device)
        self.t.start(x[:16_384])
        ids = dead_ids(job)
        if len(ids):
            self.t.dead = Dead(ids, min(cfg.aux_width(), len(ids)))
            self.t.refresh_dead = lambda: None  # type: ignore[method-assign]

    def mark_dead(self) -> None:
        """The list stays: no refresh takes it away."""

    def step(self, x: torch.Tensor) -> None:
        self.t.step(x, 5000)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        sae, scale = self.t.sae, self.t.scale
        return sae.decode(sae.encode(x * scale)) / scale


class SaeLens:
    """sae_lens.SAETrainer on a TopKTrainingSAE."""

    def __init__(self, x: torch.Tensor, job: dict[str, Any]) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        cfg = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=job["d_sae"], k=job["k"], device="cpu")
        config = SAETrainerConfig(
            total_training_samples=NEVER, train_batch_size_samples=job["batch"], lr=job["lr"], lr_end=job["lr"],
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.t = SAETrainer(config, TopKTrainingSAE(cfg), data_provider=iter(()))
        self.ids = dead_ids(job)

    def mark_dead(self) -> None:
        self.t.n_forward_passes_since_fired[self.ids] = NEVER

    def step(self, x: torch.Tensor) -> None:
        self.t.step(x)
        self.t.n_training_steps += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.t.sae(x)


class DictionaryLearning:
    """dictionary_learning's TopKTrainer."""

    def __init__(self, x: torch.Tensor, job: dict[str, Any]) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.t = TopKTrainer(
            steps=10**6, activation_dim=x.shape[1], dict_size=job["d_sae"], k=job["k"], layer=0, lm_name="none",
            lr=job["lr"], warmup_steps=0, seed=0, device="cpu",
        )  # fmt: skip
        self.n = 0
        self.ids = dead_ids(job)

    def mark_dead(self) -> None:
        self.t.num_tokens_since_fired[self.ids] = NEVER

    def step(self, x: torch.Tensor) -> None:
        self.t.update(self.n, x)
        self.n += 1

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.t.ae(x)


class Sparsify:
    """sparsify's SparseCoder, stepped as its Trainer.fit does for one SAE: plain Adam, AuxK 1/32."""

    def __init__(self, x: torch.Tensor, job: dict[str, Any]) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(0)
        cfg = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
        self.sae = SparseCoder(x.shape[1], cfg, "cpu", dtype=torch.float32)
        self.opt = torch.optim.Adam(self.sae.parameters(), lr=job["lr"])
        self.since = torch.zeros(job["d_sae"], dtype=torch.long)
        self.fired = torch.zeros(job["d_sae"], dtype=torch.bool)
        self.ids = dead_ids(job)
        self.sae.b_dec.data = x[: job["batch"]].mean(0)

    def mark_dead(self) -> None:
        self.since[self.ids] = NEVER

    def step(self, x: torch.Tensor) -> None:
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=self.since > 10_000_000, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.opt.step()
        self.opt.zero_grad()
        with torch.no_grad():
            self.since += len(x)
            self.since[self.fired] = 0
            self.fired.zero_()

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x).sae_out


PEERS: dict[str, Any] = {
    "ours": Ours, "saelens": SaeLens, "dictionary_learning": DictionaryLearning, "sparsify": Sparsify
}  # fmt: skip


def dead_ids(job: dict[str, Any]) -> torch.Tensor:
    """The same random share of the latents for everyone; none where the share is 0."""
    order = torch.randperm(job["d_sae"], generator=torch.Generator().manual_seed(1))
    return order[: int(job["d_sae"] * job["dead"])].sort().values


class Worker:
    """Rows of the file are taken in order, batch by batch, round and round; its last batch is held out."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        rows = torch.from_numpy(np.load(job["data"]))
        self.job, self.batch = job, job["batch"]
        self.heldout, self.rows, self.at = rows[-self.batch :], rows[: -self.batch], 0
        self.trainer = PEERS[job["peer"]](self.rows, job)

    def next_batch(self) -> torch.Tensor:
        if self.at + self.batch > len(self.rows):
            self.at = 0
        self.at += self.batch
        return self.rows[self.at - self.batch : self.at].clone()

    def step(self) -> dict[str, float]:
        x = self.next_batch()
        self.trainer.mark_dead()
        start = time.perf_counter()
        self.trainer.step(x)
        return {"seconds": time.perf_counter() - start}

    def fvu(self) -> float:
        with torch.no_grad():
            x = self.heldout
            error = (x - self.trainer.reconstruct(x)).double().pow(2).sum()
            return (error / (x - x.mean(0)).double().pow(2).sum()).item()

    def train(self, steps: int, every: int) -> dict[str, Any]:
        curve = [[0, self.fvu()]]
        for i in range(steps):
            self.trainer.step(self.next_batch())
            if (i + 1) % every == 0:
                curve.append([(i + 1) * self.batch, self.fvu()])
        return {"fvu": curve}

    def memory(self, steps: int) -> dict[str, int]:
        """Peak of the resident set over the steps, less what was resident before them (Linux)."""
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            self.trainer.mark_dead()
            self.trainer.step(self.next_batch())
        return {"growth": _status("VmHWM") - before}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def main() -> None:
    # libraries print to stdout as they load: answers go to the real one, the rest to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "make":
            worker, reply = Worker(command), {"ready": True}
        else:
            reply = getattr(worker, do)(**command)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
