"""Models of the attribution tests: a linear one, and the tiny random ones with their own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache.models import LanguageModel, load_model
from probes.attribution.pairs import TokenPair
from tests.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


class NoNorm(nn.Module):
    """A norm that does nothing, so that the model is linear."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x


def tiny_family(family: str, folder: Path, **changes: Any) -> LanguageModel:
    """A random 3-layer llama, gemma2 (soft-cap) or gemma3 (QK-norm, sliding window) with 4 heads over 2 KV heads."""
    import transformers as tf

    tok = tiny_tokenizer()
    sizes = {"vocab_size": len(tok), **SIZES, **changes}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    if family == "gemma3":
        hf: Any = tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                head_dim=8, sliding_window=4, layer_types=layers, query_pre_attn_scalar=8, **sizes
            )
        )
    elif family == "gemma2":
        hf = tf.Gemma2ForCausalLM(
            tf.Gemma2Config(
                head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **sizes
            )
        )
    else:
        hf = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    hf.save_pretrained(folder)
    tok.save_pretrained(folder)
    return load_model(folder, device="cpu")


def linear_model(
    folder: Path, change: Callable[[Any], None] | None = None, *, layers: int = 3
) -> LanguageModel:
    """A llama without norms, with a linear MLP and attention that is uniform (W_q = 0): linear from end to end.

    `change(hf)` alters the weights before it is wrapped, for example to let one layer attend.
    """
    import transformers as tf

    tok = tiny_tokenizer()
    config = tf.LlamaConfig(
        vocab_size=len(tok), attn_implementation="eager", **{**SIZES, "num_hidden_layers": layers}
    )
    torch.manual_seed(0)
    hf: Any = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = NoNorm(32), NoNorm(32)
            layer.self_attn.q_proj.weight.zero_()
            layer.mlp.act_fn = _Ones()
        hf.model.norm = NoNorm(32)
        if change is not None:
            change(hf)
    hf.save_pretrained(folder)
    tok.save_pretrained(folder)
    return LanguageModel("linear", hf, tok, folder, backend="transformer_lens", weights_sha="0" * 64)


class _Ones(nn.Module):
    """The gate of a gated MLP held open."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def pair(clean: list[int], noise: list[int], *, answers: Any = ((7,),), wrong: Any = ((8,),)) -> TokenPair:
    return TokenPair(clean=tuple(clean), noise=tuple(noise), answers=answers, wrong=wrong)


def random_pair(length: int = 9, *, seed: int = 0, first: int = 2, **kwargs: Any) -> TokenPair:
    """Two random prompts of tokens above 20 that agree before `first` and after it in places."""
    g = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randint(20, 380, (length,), generator=g) for _ in range(2))
    noise[:first] = clean[:first]
    noise[first + 2 :] = clean[first + 2 :]
    return pair(clean.tolist(), noise.tolist(), **kwargs)
