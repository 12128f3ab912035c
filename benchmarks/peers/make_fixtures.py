"""Tiny SAEs written by the peers' own code, with what they compute: the golden files of tests/test_foreign_files.py.

    pip install torch==2.13.0 dictionary-learning==0.1.0 eai-sparsify==1.3.3 && pip uninstall -y torchvision
    SPARSIFY_DISABLE_TRITON=1 python benchmarks/peers/make_fixtures.py tests/fixtures/foreign

That environment is not the project's: the peers ask for other versions. d_model 8, 16 latents, a few kB a folder; each
folder gets expected.safetensors with rows x, dense codes and the reconstruction x_hat. sae-lens, whose loader is the
reference for Gemma Scope, runs live in the tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

D, N, K, LAYER = 8, 16, 3, 1
MODEL = "EleutherAI/pythia-70m-deduped"


def rows() -> torch.Tensor:
    return torch.randn(12, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def randomise(module: torch.nn.Module) -> None:
    """Values that leave nothing zero, unit or tied: a forgotten bias or norm shows."""
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * (0.3 if p.ndim == 1 else 0.6))
            if name == "threshold":
                p.abs_().add_(0.2)


def expected(folder: Path, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    tensors = {"x": rows(), "codes": codes.detach(), "x_hat": x_hat.detach()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "expected.safetensors")
    print(folder, f"L0 {(codes != 0).sum(1).float().mean():.2f}", flush=True)


def sparsify(root: Path) -> None:
    from sparsify import SaeConfig, SparseCoder
    from sparsify.__main__ import RunConfig

    run = root / "sparsify"
    config = SaeConfig(expansion_factor=2, k=K)
    sae = SparseCoder(D, config)
    randomise(sae)
    folder = run / f"layers.{LAYER}"
    sae.save_to_disk(folder)
    RunConfig(sae=config, model=MODEL, dataset="EleutherAI/the_pile_deduplicated", ctx_len=64).save_json(
        run / "config.json"
    )
    out = sae(rows())
    codes = torch.zeros(len(rows()), N).scatter_(1, out.latent_indices, out.latent_acts)
    expected(folder, codes, out.sae_out)


def dictionary_learning(root: Path) -> None:
    from dictionary_learning import trainers as t
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.utils import load_dictionary

    common = {
        "steps": 10, "activation_dim": D, "dict_size": N, "layer": LAYER, "lm_name": MODEL, "device": "cpu",
        "submodule_name": f"resid_post_layer_{LAYER}", "warmup_steps": 1,
    }  # fmt: skip
    groups = {"group_fractions": [0.25, 0.75]}
    made = {
        "AutoEncoder": StandardTrainer(**common, sparsity_warmup_steps=2),
        "GatedAutoEncoder": GatedSAETrainer(**common, sparsity_warmup_steps=2),
        "JumpReluAutoEncoder": JumpReluTrainer(**common, sparsity_warmup_steps=2),
        "AutoEncoderTopK": t.TopKTrainer(**common, k=K),
        "BatchTopKSAE": BatchTopKTrainer(**common, k=K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKTrainer(**common, k=K, **groups),
    }
    buffer = {"d_submodule": D, "io": "out", "n_ctxs": 100, "ctx_len": 64, "refresh_batch_size": 8,
              "out_batch_size": 64, "device": "cpu"}  # fmt: skip
    for name, trainer in made.items():
        write_dictionary(
            root / "dictionary_learning" / name, trainer.ae, trainer.config, buffer, load_dictionary
        )
    old = AutoEncoderNew(D, N)
    config = made["AutoEncoder"].config | {"dict_class": "AutoEncoderNew"}
    write_dictionary(root / "dictionary_learning" / "AutoEncoderNew", old, config, buffer, load_dictionary)


def write_dictionary(folder: Path, ae, config: dict, buffer: dict, load_dictionary) -> None:
    """As `trainSAE` writes it; the expected values come from the dictionary that the peer loads from there."""
    randomise(ae)
    if "BatchTopK" in folder.name:
        ae.threshold.fill_(0.8)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({n: p.cpu() for n, p in ae.state_dict().items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}, indent=1))
    loaded, _ = load_dictionary(str(folder), "cpu")
    codes = loaded.encode(rows())
    expected(folder, codes, loaded.decode(codes))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sparsify(target)
    dictionary_learning(target)
    print(json.dumps({"fixtures": str(target), "d_model": D, "d_sae": N, "k": K}))
