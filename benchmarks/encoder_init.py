"""Where the encoder starts: at the scale that reconstructs the first rows best, or at a quarter of it (`encoder_init`).

Both starts train on the same batches in one pass; held-out FVU and the share of latents that fire on held-out rows.

    python benchmarks/encoder_init.py --workspace PATH [--steps 300] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "claims"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _common import heldout_rows, quality

from app.lookup import open_store
from saes import TrainConfig, presets, train

LRS = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
WIDTH = 2304
SAES = {
    "topk": presets.topk(d_sae=WIDTH, k=32),
    "abs_topk": presets.abs_topk(d_sae=WIDTH, k=32),
    "batch_topk": presets.batch_topk(d_sae=WIDTH, k=32),
}


def compare(store: Any, name: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds of both starts, and FVU(scaled) / FVU(quarter) - 1 of each seed."""
    found: dict[str, list[dict[str, float]]] = {"scaled": [], "quarter": []}
    rows = heldout_rows(store, store.hooks[0])
    for seed in range(args.seeds):
        config = TrainConfig(
            steps=args.steps, batch_size=1024, lr=lr, warmup_steps=50, seed=seed, log_every=args.steps
        )
        configs = [replace(SAES[name], encoder_init=init, name=f"{name}-{init}") for init in found]  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            results = train(store, configs, config, hook=store.hooks[0], workspace=Path(folder))
        for init, result in zip(found, results, strict=True):
            found[init].append(quality(result.sae, rows))
    gain = [a["fvu"] / b["fvu"] - 1 for a, b in zip(found["scaled"], found["quarter"], strict=True)]
    mean = {
        f"{what}_{init}": round(statistics.mean(r[what] for r in runs), 4)
        for init, runs in found.items()
        for what in ("fvu", "alive")
    }
    return {"sae": name, "lr": lr} | mean | {"gain": [round(g, 4) for g in gain]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, default=None)
    parser.add_argument("--store", default="latest")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    store = open_store(args.store, args.workspace)
    table = []
    for name in SAES:
        for lr in LRS if name == "topk" else (1.6e-3,):
            table.append(compare(store, name, lr, args))
            print(table[-1], flush=True)
    print(json.dumps({"tokens": args.steps * 1024, "hook": store.hooks[0], "encoder_init": table}))


if __name__ == "__main__":
    main()
