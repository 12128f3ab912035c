"""Time to show one feature of an SAE that nobody has run yet, beside SAEDashboard (`pip install sae-dashboard`).

Both start from the same model, SAE and tokens, with nothing cached: a TransformerLens model of SmolLM2-135M's shape with
random weights and a small vocabulary (which spares SAEDashboard most of its unembedding), a TopK SAE of 4,608 latents at
layer 15, contexts of 128 tokens. SAEDashboard runs the model over the text for each set of features it shows. Atomscope
harvests, encodes and indexes all latents; a further feature is then a query.

dashboard_first_s / dashboard_next_s    SaeVisRunner.run for one feature, and for another one
index_first_s                           forward passes, store, codes, index, and the first 20 contexts
index_next_s                            the contexts of another feature
The last line is one JSON object. Usage: python benchmarks/index_saedashboard.py [--contexts N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONTEXT, LAYER, D_MODEL, D_SAE, K = 128, 15, 576, 4_608, 32
HOOK = f"blocks.{LAYER}.hook_resid_post"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", type=int, default=128)
    parser.add_argument("--folder", help="where to put the temporary workspace (a real disk)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sae_vis_runner import SaeVisRunner
    except ImportError as e:
        raise SystemExit(f"SAEDashboard cannot be imported ({e}): pip install sae-dashboard") from e
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        model, tokens = small_vocabulary_model(args.contexts)
        sae = random_sae(model, tokens)
        theirs = load_in_sae_lens(sae, root)

        def dashboard(feature: int) -> Any:
            config = SaeVisConfig(hook_point=HOOK, features=[feature], device="cpu", minibatch_size_tokens=32)
            return SaeVisRunner(config).run(encoder=theirs, model=model, tokens=tokens)

        index = seconds(lambda: build(root, model, sae, tokens))
        opened, first_index = index[0], index[1]
        figures = {
            "tokens": tokens.numel(),
            "dashboard_first_s": seconds(lambda: dashboard(7))[1],
            "dashboard_next_s": seconds(lambda: dashboard(8))[1],
            "index_first_s": first_index,
            "index_next_s": seconds(lambda: opened.examples(8, n=20))[1],
        }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = run()
    took = time.perf_counter() - started
    print(f"{took:8.3f} s", flush=True)
    return result, took


def small_vocabulary_model(contexts: int) -> tuple[Any, torch.Tensor]:
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    cfg = HookedTransformerConfig(
        n_layers=30, d_model=D_MODEL, n_ctx=CONTEXT, d_head=64, n_heads=9, n_key_value_heads=3, d_mlp=1536,
        d_vocab=len(tokenizer), act_fn="silu", gated_mlp=True, normalization_type="RMS",
        positional_embedding_type="rotary", rotary_dim=64, device="cpu", seed=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, len(tokenizer), (contexts, CONTEXT), generator=generator)
    return HookedSAETransformer(cfg, tokenizer=tokenizer).eval(), tokens


def random_sae(model: Any, tokens: torch.Tensor) -> Any:
    from saes import SAE, SAEConfig
    from saes.initialise import initialise

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:32], names_filter=HOOK, stop_at_layer=LAYER + 1)
    cfg = SAEConfig(d_sae=D_SAE, k=K, d_model=D_MODEL, hook=HOOK, model="random")
    sae = SAE(cfg).requires_grad_(False)
    initialise(sae, cache[HOOK].reshape(-1, D_MODEL), seed=0)
    return sae


def load_in_sae_lens(sae: Any, root: Path) -> Any:
    from sae_lens import SAE as LensSAE

    theirs = LensSAE.load_from_disk(str(sae.save(root / "sae")))
    # SAEDashboard folds decoder norms, which sae-lens refuses without this; the rows are unit, so it changes nothing
    theirs.cfg.rescale_acts_by_decoder_norm = True
    return theirs


def build(root: Path, model: Any, sae: Any, tokens: torch.Tensor) -> Any:
    """Forward passes up to the hook, a store of their residuals, the index, and one feature's contexts."""
    from saes.indexing import build_index
    from saes.queries import FeatureIndex
    from tests.corpora import empty_store, make_corpus

    corpus = make_corpus(root, [CONTEXT] * len(tokens), group_rows=122_880)
    store = empty_store(root, corpus, rows_per_shard=8_192)
    with store.writer() as writer, torch.no_grad():
        for i, (seq0, seq1, _, _) in enumerate(store.shards):
            parts = []
            for part in tokens[seq0:seq1].split(32):
                _, cache = model.run_with_cache(part, names_filter=HOOK, stop_at_layer=LAYER + 1)
                parts.append(cache[HOOK].reshape(-1, D_MODEL).half())
            writer.submit(i, HOOK, torch.cat(parts))
    build_index(sae, store)
    index = FeatureIndex.open(root)
    index.examples(7, n=20)
    return index


if __name__ == "__main__":
    main()
