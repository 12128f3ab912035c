"""FAST (arXiv 2506.07691), its last claim: steering with a template-token feature makes answers better, up to a point.

    python benchmarks/claims/fast_steering.py --workspace W [--full]      W: a workspace with the packaged model and corpora

The paper adds alpha d_k to the residual, k the latent of largest mean maximal activation on template tokens, and reads three
answers. Judge-free here: the loss of the reference answers of held-out dialogues (assistant's own tokens, teacher-forced), with
alpha d_k added at every position but 0. k is found on train dialogues, position 0 left out: the largest there is the attention
sink. alpha, in mean residual norms, is the best of ALPHAS on every other held-out dialogue and judged on the rest.

Registered before the run (verdicts as in _common.py), a value a seed (TopK, k 32, trained on the FAST path), 3 seeds, 6 with --full:
    lower_loss        loss without steering less loss with it, nats a token       at least 0.01   (paper: better answers)
    beats_random      loss with a random live latent's direction of the same length less that with d_k     at least 0.01
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fast
import numpy as np
import torch
from _common import Report, arguments, judge, parsed
from torch.nn import functional as F

from cache import build_corpus, harvest, load_model
from cache.packing import FLAG_SPECIAL, ROLE_ASSISTANT
from cache.workspace import workspace_path
from saes import SAE, TrainConfig, presets, train
from saes.token_classes import class_masks

ALPHAS = (0.1, 0.2, 0.4)


def template_latent(sae: SAE, store: Any, hook: str) -> int:
    """The latent whose largest activation on a dialogue's template tokens is largest on average."""
    total = np.zeros(sae.cfg.d_sae)
    doc = store.corpus.column("doc")
    best: dict[int, np.ndarray] = {}
    for batch in store.sequential(hook, batch_size=4096, split="train", skip="first"):
        at = np.asarray(batch.row)
        keep = class_masks(store.corpus, at)["special_rest"]
        z = sae.encode(batch.x[hook][torch.from_numpy(keep)]).dense(sae.cfg.d_sae).numpy()
        for d in np.unique(doc[at[keep]]):
            top = z[doc[at[keep]] == d].max(0)
            best[d] = np.maximum(best[d], top) if d in best else top
    for top in best.values():
        total += top
    return int(total.argmax())


def live_latent(sae: SAE, store: Any, hook: str, not_this: int, seed: int) -> int:
    """A random latent among those that fire."""
    batch = next(iter(store.sequential(hook, batch_size=8192, split="train", skip="first")))
    alive = sae.encode(batch.x[hook]).indices.unique().numpy()
    return int(np.random.default_rng(seed).choice(alive[alive != not_this]))


@torch.no_grad()
def answer_losses(
    model: Any, corpus: Any, seqs: Sequence[int], hook: str, add: torch.Tensor | None
) -> np.ndarray:
    """Mean loss of the assistant's own tokens of each dialogue, with `add` on every row but position 0."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        assert add is not None
        return torch.cat([x[:, :1], x[:, 1:] + add.to(x.dtype)], dim=1)

    offsets, columns = corpus.seq_offsets, {n: corpus.column(n) for n in ("tok", "role", "flags")}
    out = []
    for seq in seqs:
        rows = slice(offsets[seq], offsets[seq + 1])
        ids = torch.from_numpy(columns["tok"][rows].astype(np.int64))[None]
        answer = (columns["role"][rows] == ROLE_ASSISTANT) & (columns["flags"][rows] & FLAG_SPECIAL == 0)
        with model.hooked({} if add is None else {hook: shifted}):
            logits = model.forward(ids)[0][0, :-1].float()
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        out.append(loss[torch.from_numpy(answer[1:])].mean().item())
    return np.array(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, batch=512)
    parser.add_argument("--tokens", type=int, help="training tokens")
    parser.add_argument("--dialogues", type=int, help="held-out dialogues")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1", help="a chat model")
    parser.add_argument("--hook", default="blocks.15.hook_resid_post")
    parser.add_argument("--width", type=int, default=4, help="latents over d_model")
    args = parsed(parser, argv, full_seeds=6)
    args.tokens = args.tokens or 30_000
    args.steps = args.steps or (600 if args.full else 400)
    args.dialogues = args.dialogues or (48 if args.full else 24)
    report = Report("FAST (arXiv 2506.07691), steering", args.out)
    root = workspace_path(args.workspace, create=False)
    with tempfile.TemporaryDirectory(prefix="claims-") as folder:
        ws = Path(folder)
        (ws / "assets").symlink_to((root / "assets").resolve())
        model = load_model(args.model, workspace=ws)
        chats, heldout = fast.chosen_dialogues(
            model.tokenizer, root, args.tokens, args.tokens // 3, args.context
        )
        corpus = build_corpus(
            chats + heldout, model.tokenizer, mode="dialogue", context=args.context, workspace=ws
        )
        store = harvest(model, corpus, hooks=args.hook, workspace=ws, show_progress=False)
        size = store.stats(args.hook, split="train", skip="first").mean_norm
        split = corpus.column("split")[corpus.seq_offsets[:-1]]
        seqs = np.flatnonzero(split == 1)[: args.dialogues].tolist()
        clean = answer_losses(model, corpus, seqs, args.hook, None)
        print(f"{len(seqs)} held-out dialogues, loss {clean.mean():.3f} nats without steering", flush=True)
        gains, over_random, chosen = [], [], []
        for seed in range(args.seeds):
            config = TrainConfig(
                steps=args.steps, batch_size=args.batch, lr=2e-3, warmup_steps=50, dead_window_tokens=50_000,
                skip=None, seed=seed, log_every=args.steps,
            )  # fmt: skip
            job = [presets.fast(presets.topk)(d_sae=args.width * store.d(args.hook), k=fast.K)]
            sae = train(store, job, config)[0].sae
            k = template_latent(sae, store, args.hook)
            other = live_latent(sae, store, args.hook, k, seed)
            found = {
                (name, a): answer_losses(model, corpus, seqs, args.hook, a * size * sae.W_dec[latent])
                for name, latent in (("template", k), ("random", other)) for a in ALPHAS
            }  # fmt: skip
            best = min(ALPHAS, key=lambda a: found["template", a][::2].mean())
            rest = slice(1, None, 2)
            gains.append(float((clean - found["template", best])[rest].mean()))
            over_random.append(float((found["random", best] - found["template", best])[rest].mean()))
            chosen.append(
                {"latent": k, "alpha": best, "loss": {f"{n} {a}": v.mean() for (n, a), v in found.items()}}
            )
            print(
                f"seed {seed}: latent {k}, alpha {best}: gain {gains[-1]:.4f}, over random {over_random[-1]:.4f}",
                flush=True,
            )
    why = f"nats a token; alpha {[c['alpha'] for c in chosen]} mean norms, chosen on half of {len(seqs)} dialogues"
    report.claim(
        "lower_loss", judge(gains, 0.01), seeds=args.seeds, why=why, paper_figure="three answers, read"
    )
    report.claim("beats_random", judge(over_random, 0.01), seeds=args.seeds, why=why)
    report.data = {"clean_loss": clean.mean(), "seeds": chosen}
    report.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
