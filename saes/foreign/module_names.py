"""Names of modules of a Hugging Face model as hooks here: sparsify and sae-lens's AutoModelForCausalLM take their outputs.

    model.layers.3, transformer.h.3, layers.3        blocks.3.hook_resid_post
    ....mlp    ....self_attn, attn, attention        blocks.3.hook_mlp_out    blocks.3.hook_attn_out
    model.embed_tokens, transformer.wte              hook_embed

Gemma 2 and 3 norm what attention and MLP give before it is added, and hooks here are what is added: the norms' outputs.
"""

from __future__ import annotations

import re

# a list of layers elsewhere is not the decoder: vision_tower.encoder.layers
_BEFORE = r"(?:(?:model|language_model|decoder|transformer|gpt_neox)\.)*"
_PARTS = {"": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out", "self_attn": "hook_attn_out",
          "attention": "hook_attn_out"}  # fmt: skip
_NORMED = {"": "hook_resid_post", "post_feedforward_layernorm": "hook_mlp_out",
           "post_attention_layernorm": "hook_attn_out"}  # fmt: skip


def hook_of(name: str, model: str = "") -> str:
    """TransformerLens's name of a module's output; "" where it has none. `model` is the name of the model."""
    if re.fullmatch(_BEFORE + r"(?:embed_tokens|embed_in|wte)", name):
        return "hook_embed"
    found = re.fullmatch(_BEFORE + r"(?:layers|h)[._](\d+)(?:\.(\w+))?", name)
    parts = _NORMED if re.search(r"gemma-?[23](?!\d*b)|shieldgemma|medgemma", model.lower()) else _PARTS
    part = None if found is None else parts.get(found[2] or "")
    return f"blocks.{found[1]}.{part}" if found and part else ""
