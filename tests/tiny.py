"""A tiny random Llama with a real tokenizer, and sentences to run through it: what the tests use as a model.

3 layers, d_model 64, 4 heads (2 key-value heads), float32, about 400 byte-level BPE tokens, an eos token and a
chat template. `tiny_model_dir(path)` writes a plain Hugging Face folder; the same seed gives the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

D_MODEL = 64
N_LAYERS = 3
VOCAB = 400
CONTEXT = 512
EOS = "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ANIMALS = ("cat", "dog", "heron", "fox", "tortoise", "bee", "whale", "sparrow", "goat", "mole")
_PLACES = (
    "garden",
    "harbour",
    "old mill",
    "forest",
    "library",
    "market",
    "station",
    "river",
    "attic",
    "field",
)
_TEMPLATES = (
    "The {animal} waited in the {place} until the rain had stopped.",
    "Nobody in the {place} had ever seen a {animal} before.",
)
_EXTRA = (
    "Water boils at a lower temperature on a high mountain.",
    "She said: “the café opens at nine”, and left.",
    "A 12 % rise over 3 years is 36 % at most.",
    "Short.",
)

SENTENCES: list[str] = [t.format(animal=a, place=p) for t in _TEMPLATES for a in _ANIMALS for p in _PLACES]
SENTENCES += list(_EXTRA)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on SENTENCES; any text round trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model_dir(path: Path | str, *, seed: int = 0) -> Path:
    """Write the tiny model and its tokenizer to `path` as a Hugging Face folder and return the path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    out = Path(path)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=128,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        # Larger than the usual 0.02, so that attention and the MLP move the residual by a visible amount.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:  # a gain of 1 everywhere would hide a missing norm
                    weight.copy_(1.0 + 0.3 * torch.randn_like(weight))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    return out
