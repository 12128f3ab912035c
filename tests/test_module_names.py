"""SAEs that sae-lens trained on a Hugging Face model: their hooks are names of modules, and ours hold the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import DataError
from cache.plain_model import PlainModel
from saes.foreign.module_names import hook_of
from saes.sae import SAE
from saes.splice import attach
from tests.test_saelens_conventions import written

pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
D = 16


def make_model(family: str) -> Any:
    import transformers as t

    more: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}  # fmt: skip
    wide = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config: Any = {
            "llama": lambda: t.LlamaConfig(num_key_value_heads=2, **wide, **more),
            "gpt2": lambda: t.GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=64, **more),
            "gpt_neox": lambda: t.GPTNeoXConfig(use_parallel_residual=False, **wide, **more),
            "gemma": lambda: t.GemmaConfig(num_key_value_heads=2, head_dim=4, pad_token_id=0, **wide, **more),
            "gemma-2": lambda: t.Gemma2Config(num_key_value_heads=2, head_dim=4, pad_token_id=0, **wide, **more),
        }[family]()  # fmt: skip
        return t.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.1", "model.layers.0.mlp", "model.layers.1.self_attn"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1.mlp", "transformer.h.1.attn"]),
        ("gpt_neox", ["gpt_neox.layers.1", "gpt_neox.layers.0.mlp", "gpt_neox.layers.1.attention"]),
        (
            "gemma-2",
            [
                "model.layers.1",
                "model.layers.0.post_feedforward_layernorm",
                "model.layers.1.post_attention_layernorm",
            ],
        ),
    ],
)
def test_the_rows_of_a_module_are_those_of_the_hook_it_gets(family: str, names: list[str]) -> None:
    from sae_lens.load_model import HookedProxyLM

    model, tokens = make_model(family), torch.arange(8)[None] + 3
    theirs = HookedProxyLM(model, None, hook_names=names)  # type: ignore[arg-type]
    _, cache = theirs.run_with_cache(tokens, names_filter=names)
    got: dict[str, torch.Tensor] = {}

    def see(hook: str) -> Any:
        return lambda x: got.update({hook: x})

    hooks = [hook_of(n, f"google/{family}-2b") for n in names]
    with PlainModel(model).hooked({h: see(h) for h in hooks}):
        model(tokens)
    assert all(hooks) and len(set(hooks)) == len(names)
    for name, hook in zip(names, hooks, strict=True):
        assert torch.equal(got[hook], cache[name])


@pytest.mark.parametrize(
    "name", ["vision_tower.encoder.layers.1", "model.layers.1.mlp.down_proj", "model.norm", "lm_head"]
)
def test_other_modules_have_no_hook(name: str) -> None:
    assert hook_of(name) == "" == hook_of(name, "google/gemma-2-2b")
    assert hook_of("model.layers.1.mlp", "google/gemma-2-2b") == ""  # normed before it is added


def trained_on(name: str, path: Path, **more: Any) -> Path:
    meta = {"hook_name": name, "model_class_name": "AutoModelForCausalLM", "model_name": "gpt2"}
    return written("topk", path, metadata=meta | more)


def test_an_sae_of_a_hugging_face_model_is_at_its_place_in_that_model(tmp_path: Path) -> None:
    sae = SAE.load(trained_on("transformer.h.1", tmp_path / "sae"))
    assert sae.cfg.hook == "blocks.1.hook_resid_post"
    again = SAE.load(sae.save(tmp_path / "again"))
    assert (again.cfg.hook, again.sae_id) == (sae.cfg.hook, sae.sae_id)
    model = make_model("gpt2")
    with torch.no_grad(), attach(model, sae) as a:
        model(torch.arange(8)[None])
    assert list(a.codes) == ["blocks.1.hook_resid_post"]
    named = trained_on("blocks.0.hook_mlp_out", tmp_path / "named")
    assert SAE.load(named).cfg.hook == "blocks.0.hook_mlp_out"


def test_a_module_without_a_name_here_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = trained_on("transformer.h.1.mlp.c_proj", tmp_path / "sae")
    with pytest.raises(DataError, match=r"hook_name='transformer\.h\.1\.mlp\.c_proj'") as e:
        SAE.load(path)
    assert "\n" not in str(e.value)
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.1.hook_mlp_out"
    (path / "cfg.json").write_text(json.dumps(cfg))
    assert SAE.load(path).cfg.hook == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(
    ("model", "hook"),
    [
        ("google/gemma-2b", "blocks.1.hook_mlp_out"), ("google/gemma-2b-it", "blocks.1.hook_mlp_out"),
        ("google/gemma-7b", "blocks.1.hook_mlp_out"), ("google/codegemma-2b", "blocks.1.hook_mlp_out"),
        ("google/gemma-2-2b", ""), ("google/gemma-2-27b-it", ""), ("google/gemma-3-270m", ""), ("google/gemma3-1b", ""),
        ("google/medgemma-4b-it", ""),
    ],
)  # fmt: skip
def test_the_first_gemma_is_not_taken_for_the_second_by_its_2b(model: str, hook: str) -> None:
    """Gemma 2 and 3 normalise what a layer writes, the first one does not: its post_attention_layernorm reads."""
    assert hook_of("model.layers.1.mlp", model) == hook
    if hook:
        assert hook_of("model.layers.1.post_attention_layernorm", model) == ""
