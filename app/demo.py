"""The main job, end to end, on the packaged model and corpus: harvest, train, evaluate, index.

Every stage is resumable and finds its own finished work, so the demo can be killed anywhere and started again.
The summary compares the two heavy stages with their floors, measured in the same run: the harvest with a bare
forward pass that stops at the same layer, the training step with the encoder's matrix product.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cache.errors import AtomscopeError
from cache.provenance import provenance
from cache.workspace import read_json, write_json

T = TypeVar("T")
FLOOR_REPEATS = 7
FLOOR_BATCHES = 6


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's job. The defaults take a few minutes on two cores."""

    model: str = "smollm2-135m-instruct-q4_1"
    """Packaged model, local folder or hub id."""
    corpus: str = "boolq"
    """Packaged corpus or a text file."""
    max_tokens: int = 212_000
    """Tokens to harvest."""
    context: int = 256
    """Tokens of one forward pass."""
    hook: str = "blocks.15.hook_resid_post"
    """Where activations are taken."""
    d_sae: int = 4608
    """Latents: 8 x d_model of the packaged model."""
    k: int = 32
    """Active latents a token."""
    steps: int = 1500
    """Training steps."""
    batch_size: int = 2048
    """Rows of a step."""
    lr: float = 8e-4
    """Peak learning rate."""
    dead_window_tokens: int = 100_000
    """Rows after which a silent latent counts as dead: the run is short."""
    eval_tokens: int = 5000
    """Held-out tokens for the cross-entropy."""


class Summary:
    """Stages with their seconds and notes; kept in `demo.json`, so that a restarted demo still tells all of them."""

    def __init__(self, workspace: Path, config: DemoConfig) -> None:
        self.path = workspace / "demo.json"
        self.record: dict[str, Any] = {"config": asdict(config), "stages": {}, "finished": False}
        if self.path.is_file():
            try:
                old = read_json(self.path)
            except AtomscopeError:
                old = {}
            if old.get("config") == self.record["config"]:
                self.record = old

    def stage(self, name: str, run: Callable[[], T]) -> T:
        """Run a stage and add its seconds to those of earlier starts (a start that was killed is not counted)."""
        print(f"\n== {name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        entry = self.record["stages"].setdefault(name, {"seconds": 0.0})
        try:
            return run()
        finally:
            entry["seconds"] += time.monotonic() - started
            write_json(self.path, self.record)

    def note(self, name: str, **values: Any) -> None:
        self.record["stages"].setdefault(name, {"seconds": 0.0}).update(values)
        write_json(self.path, self.record)

    def finish(self, **values: Any) -> None:
        self.record |= values | {"finished": True, "provenance": provenance()}
        write_json(self.path, self.record)


def run_demo(workspace: Path, config: DemoConfig | None = None) -> dict[str, Any]:
    """Run what is missing of the demo and return its summary (the content of `demo.json`)."""
    config = config or DemoConfig()
    summary = Summary(workspace, config)
    if summary.record["finished"] and (workspace / summary.record["index"] / "current.json").is_file():
        return summary.record
    from cache import build_corpus, load_model
    from saes.indexing import build_index

    model = summary.stage("model", lambda: load_model(config.model, workspace=workspace))
    corpus = summary.stage(
        "corpus",
        lambda: build_corpus(
            config.corpus, model.tokenizer, mode="document", max_tokens=config.max_tokens, context=config.context,
            workspace=workspace,
        ),
    )  # fmt: skip
    print(corpus, file=sys.stderr)
    store = summary.stage("harvest", lambda: _harvest(summary, model, corpus, config, workspace))
    result = summary.stage("train", lambda: _train(summary, store, config))
    evaluation = summary.stage("evaluate", lambda: _evaluate(result.sae, store, model, config))
    index = summary.stage("index", lambda: build_index(result.sae, store, model, sae_path=result.path))
    summary.finish(
        index=str(index.relative_to(workspace)),
        sae=str(result.path.relative_to(workspace)),
        store=store.path.name,
        evaluation=[
            {key: r[key] for key in ("subject", "metric", "value", "n", "ci_low", "ci_high")}
            for r in evaluation.rows
            if r["metric"] != "density_count"
        ],
    )
    return summary.record


def _harvest(summary: Summary, model: Any, corpus: Any, config: DemoConfig, workspace: Path) -> Any:
    from cache import harvest
    from cache.harvesting import bare_forward_rate

    store = harvest(model, corpus, hooks=[config.hook], workspace=workspace)
    run = store.last_run
    if run["tokens"]:
        rate = run["tokens"] / run["seconds"]
        bare = bare_forward_rate(model, corpus, [config.hook], FLOOR_BATCHES)
        summary.note(
            "harvest", tokens_per_second=rate, floor="bare forward", floor_per_second=bare, ratio=rate / bare
        )
    return store


def _train(summary: Summary, store: Any, config: DemoConfig) -> Any:
    from saes import TrainConfig, presets, train

    schedule = TrainConfig(
        steps=config.steps, batch_size=config.batch_size, lr=config.lr, warmup_steps=50,
        dead_window_tokens=config.dead_window_tokens,
    )  # fmt: skip
    sae = presets.topk(d_sae=config.d_sae, k=config.k)
    result = train(store, [sae], schedule, hook=config.hook)[0]
    rate = result.metrics[-1]["rate"]
    floor = config.batch_size / encoder_seconds(config.batch_size, result.sae.cfg.d_model, config.d_sae)
    summary.note(
        "train", tokens_per_second=rate, floor="encoder GEMM", floor_per_second=floor, ratio=rate / floor
    )
    return result


def encoder_seconds(rows: int, d_model: int, d_sae: int) -> float:
    """Median seconds of the float32 encoder product `[rows, d_model] x [d_model, d_sae]` on this machine, now."""
    import torch

    x, w, b = torch.randn(rows, d_model), torch.randn(d_sae, d_model), torch.zeros(d_sae)
    out = torch.empty(rows, d_sae)
    seconds = []
    for _ in range(FLOOR_REPEATS):
        start = time.perf_counter()
        torch.addmm(b, x, w.T, out=out)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _evaluate(sae: Any, store: Any, model: Any, config: DemoConfig) -> Any:
    from saes import evaluate
    from saes.evaluation import load_evaluation

    old = load_evaluation(sae, store)
    whole = old is not None and any(r["metric"] == "delta_ce" for r in old.rows)
    return old if whole else evaluate(sae, store, model, max_tokens=config.eval_tokens)


def summary_lines(record: dict[str, Any]) -> list[str]:
    """The summary as text: seconds, share and ratio to the floor of each stage, then the evaluation table."""
    total = sum(s["seconds"] for s in record["stages"].values()) or 1.0
    lines = [f"{'stage':<10}{'seconds':>9}{'share':>7}   rate and floor"]
    for name, s in record["stages"].items():
        rate = ""
        if "ratio" in s:
            rate = (
                f"{s['tokens_per_second']:,.0f} tok/s, {s['ratio']:.2f} of the {s['floor']} "
                f"({s['floor_per_second']:,.0f} tok/s)"
            )
        lines.append(f"{name:<10}{s['seconds']:>9.1f}{s['seconds'] / total:>7.0%}   {rate}".rstrip())
    lines += [f"{'all':<10}{total:>9.1f}", ""]
    return lines + evaluation_lines(record.get("evaluation", []))


SHOWN = (
    ("fvu", "held-out FVU", "{:.4f}"), ("l0", "L0", "{:.1f}"), ("fvu_usual", "... without sinks", "{:.4f}"), ("delta_ce", "delta CE, nats", "{:.3f}"),
    ("ce_recovered_zero", "CE recovered (zero)", "{:.3f}"), ("ce_recovered_mean", "CE recovered (mean)", "{:.3f}"),
    ("delta_loss_pct", "delta CE, % of clean", "{:.2f}"), ("kl", "KL, nats", "{:.3f}"),
    ("kl_score_zero", "KL recovered (zero)", "{:.3f}"), ("nmse", "NMSE", "{:.4f}"), ("cos", "cosine", "{:.3f}"),
    ("bias", "norm bias", "{:.3f}"), ("l1", "L1", "{:.1f}"), ("consistency", "firings a context", "{:.2f}"),
    ("cos_enc_dec", "cos(enc, dec)", "{:.3f}"), ("max_dec_cos", "nearest decoder row", "{:.3f}"), ("alive", "alive latents", "{:.3f}"), ("dense", "dense latents", "{:.3f}"),
)  # fmt: skip


def evaluation_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The evaluation as a text table, one column per subject."""
    if not rows:
        return []
    values = {(r["subject"], r["metric"]): r["value"] for r in rows}
    subjects = [s for s in dict.fromkeys(r["subject"] for r in rows) if s != "model" and ":" not in s]
    lines = [f"{'':<22}" + "".join(f"{s:>12}" for s in subjects)]
    for metric, title, form in SHOWN:
        cells = [form.format(values[s, metric]) if (s, metric) in values else "" for s in subjects]
        if any(cells):
            lines.append(f"{title:<22}" + "".join(f"{c:>12}" for c in cells))
    clean = [
        f"{v} {values['model', f'ce_{v}']:.3f}"
        for v in ("clean", "zero", "mean")
        if ("model", f"ce_{v}") in values
    ]
    if clean:
        lines.append(f"cross-entropy of the model, nats: {', '.join(clean)}")
    others = sorted({str(r.get("skip") or "first") for r in rows} - {"first"})
    return lines + [f"rows left out: {skip}" for skip in others]
