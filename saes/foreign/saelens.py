"""SAELens's cfg.json of any age brought to the form of sae-lens 6, and its conventions applied to the weights.

Before version 6 conventions stood beside the architecture (model_name, prepend_bos, hook_point ...), a TopK SAE was
`standard` with `activation_fn: topk`, and many files are a dump of the whole training job. Of that, what names the
model and the text goes to metadata, what only steered training is dropped by name, and the rest is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import DataError
from saes.conventions import Conventions
from saes.foreign.folding import (
    Tensors,
    fold_centring,
    fold_decoder_norms,
    fold_input_bias,
    fold_input_factor,
)
from saes.foreign.found import Card, check_kinds
from saes.foreign.module_names import hook_of

UNIT = "centred_unit_norm"
"""Input rule of space `unit`, unit norm of x - b_dec: of atomscope, not of SAELens."""
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}  # fmt: skip
_METADATA = {
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "hf_hook_name",
}  # fmt: skip
# of a training job, without effect on what the finished SAE computes
_TRAINING = {
    "hook_layer", "hook_point_layer", "hook_eval", "hook_point_eval", "dataset_trust_remote_code", "is_dataset_tokenized",
    "streaming", "use_cached_activations", "cached_activations_path", "expansion_factor",
    "from_pretrained_path", "b_dec_init_method", "decoder_orthogonal_init", "decoder_heuristic_init",
    "decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose", "normalize_sae_decoder", "noise_scale",
    "mse_loss_normalization", "l1_coefficient", "lp_norm", "scale_sparsity_penalty_by_decoder_norm",
    "l1_warm_up_steps", "lr", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "lr_end",
    "n_restart_cycles", "adam_beta1", "adam_beta2", "train_batch_size", "train_batch_size_tokens",
    "n_batches_in_buffer", "training_tokens", "total_training_tokens", "finetuning_tokens", "finetuning_method",
    "store_batch_size", "store_batch_size_prompts", "tokens_per_buffer", "seed", "feature_sampling_method",
    "feature_sampling_window", "feature_reinit_scale", "dead_feature_window", "dead_feature_threshold",
    "dead_feature_estimation_method", "resample_batches", "use_ghost_grads", "ghost_grads", "log_to_wandb",
    "log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "wandb_project", "wandb_id",
    "wandb_entity", "wandb_log_frequency", "run_name", "eval_every_n_wandb_logs", "eval_batch_size_prompts",
    "n_eval_batches", "n_checkpoints", "checkpoint_path", "verbose", "resume", "autocast", "autocast_lm",
    "compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode", "act_store_device",
    "model_kwargs", "jumprelu_init_threshold", "jumprelu_bandwidth",
}  # fmt: skip
# arguments of TransformerLens's loader that leave the residual stream and what is added to it as they are
_HARMLESS = {"center_writing_weights", "center_unembed", "fold_ln", "dtype", "torch_dtype", "n_ctx", "device",
             "revision", "checkpoint_value", "checkpoint_index", "trust_remote_code"}  # fmt: skip
_STREAM = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_embed",
)


def upgraded(raw: dict[str, Any], card: Card, path: Path) -> dict[str, Any]:
    """The config as sae-lens 6 would write it; keys that nobody knows stay, for the reader to refuse."""
    cfg = {_RENAMED.get(k, k): v for k, v in (raw | _known_overrides(card)).items()}
    # before version 6 BOS was the rule where the file does not say
    if cfg.get("metadata"):
        check_kinds(cfg, {"metadata": dict}, path)
    meta = dict(cfg["metadata"] or {}) if "metadata" in cfg else {"prepend_bos": True}
    meta |= {k: cfg.pop(k) for k in list(cfg) if k in _METADATA}
    for key in _TRAINING & set(cfg):
        del cfg[key]
    if cfg.pop("finetuning_scaling_factor", None):
        raise DataError(f"{path} scales its codes by finetuning factors, which this version does not read")
    kinds = {"model_from_pretrained_kwargs": dict, "seqpos_slice": list, "name": str}
    check_kinds(meta, {k: kind for k, kind in kinds.items() if meta.get(k) is not None}, path)
    kind, kwargs = cfg.pop("activation_fn", None), cfg.pop("activation_fn_kwargs", None) or {}
    cfg.setdefault("architecture", "standard")
    if kind == "topk" and cfg["architecture"] in ("standard", "topk"):
        cfg |= {"architecture": "topk", "k": kwargs.get("k", cfg.get("k"))}
    elif kind not in (None, "relu", "topk"):
        raise DataError(f"{path} has activation_fn={kind!r}: this version reads relu and topk")
    normalised = cfg.get("normalize_activations")
    if normalised is None or normalised is False:
        cfg["normalize_activations"] = "none"
    elif normalised is True:
        cfg["normalize_activations"] = "expected_average_only_in"
    if meta.get("hook_head_index") is not None:
        raise DataError(f"{path} reads head {meta['hook_head_index']} alone: this version reads whole hooks")
    return cfg | {"metadata": meta | _hooks(meta, path)}


def _hooks(meta: dict[str, Any], path: Path) -> dict[str, str]:
    """Hooks of an SAE that was trained on a Hugging Face model, which are names of its modules, by their names here."""
    if meta.get("model_class_name") != "AutoModelForCausalLM" or meta.get("made_by") == "atomscope":
        return {}
    named = {key: meta[key] for key in ("hook_name", "hook_name_out") if meta.get(key)}
    found = {k: n if n.startswith(("blocks.", "hook_")) else hook_of(n, meta.get("model_name") or "") for k, n in named.items()}  # fmt: skip
    for key, name in named.items():
        if not found[key]:
            raise DataError(
                f"{path} has {key}={name!r}, a module of {meta.get('model_name') or 'its model'} whose output has no name "
                "here: write the hook, such as blocks.3.hook_mlp_out, in its place"
            )
    return found


def _known_overrides(card: Card) -> dict[str, Any]:
    return {k: v for k, v in card.overrides.items() if k not in ("device", "dtype")}


def apply_conventions(tensors: Tensors, cfg: dict[str, Any], card: Card, path: Path) -> None:
    """Fold the input rules of an upgraded config into the tensors (W_enc `[d_sae, d_in]`), or refuse them."""
    meta = cfg["metadata"]
    hook = meta.get("hook_name") or ""
    rule = cfg.get("normalize_activations", "none")
    if rule not in ("none", UNIT, "expected_average_only_in"):
        raise DataError(
            f"{path} has normalize_activations={rule!r}, a rule for each row that no weight can hold: this version "
            "reads none and expected_average_only_in"
        )
    if "d_out" in cfg:
        _refuse_transcoder(cfg, rule, card, path)
    factor = card.given_factor if card.given_factor is not None else card.norm_factor
    if rule == "expected_average_only_in" and factor is None:
        raise DataError(
            f"{path} was trained on rows scaled to a mean norm of sqrt(d_in), and the factor is not in it: give "
            "norm_factor (sqrt(d_in) / the mean norm of its rows), or load it by its release"
        )
    if factor is not None and (rule == "expected_average_only_in" or card.given_factor is not None):
        fold_input_factor(tensors, factor)
    reshape = cfg.get("reshape_activations", "none")
    if reshape != "none" and not (reshape == "hook_z" and hook.endswith("hook_z")):
        raise DataError(f"{path} has reshape_activations={reshape!r}: only heads of hook_z are joined here")
    _refuse_processing(meta.get("model_from_pretrained_kwargs") or {}, hook, path)
    if "d_out" not in cfg and not cfg.get("apply_b_dec_to_input", True):
        fold_input_bias(tensors)
    if cfg.get("rescale_acts_by_decoder_norm", False):
        fold_decoder_norms(tensors)
    centred = (meta.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
    # our own folders have it folded in; rounding would give the SAE another id on each load
    if centred and meta.get("made_by") != "atomscope":
        fold_centring(tensors)


def _refuse_transcoder(cfg: dict[str, Any], rule: str, card: Card, path: Path) -> None:
    """b_dec of a transcoder belongs to its output, in another space than its input."""
    kwargs = cfg["metadata"].get("model_from_pretrained_kwargs") or {}
    scaled = rule != "none" or card.given_factor is not None
    if scaled or cfg.get("apply_b_dec_to_input", False) or kwargs.get("center_writing_weights"):
        raise DataError(
            f"{path} is a transcoder with apply_b_dec_to_input, normalize_activations or centred weights: this version "
            "reads transcoders of plain rows only"
        )


def _refuse_processing(kwargs: dict[str, Any], hook: str, path: Path) -> None:
    """Processing of the model under which this hook holds other rows than in the plain model."""
    changed = {k for k, v in kwargs.items() if v not in (None, False)}
    unknown = sorted(changed - _HARMLESS)
    inside = hook and not hook.endswith(_STREAM)
    if inside:
        unknown += sorted(changed & {"center_writing_weights", "fold_ln"} - set(unknown))
    if unknown:
        raise DataError(
            f"{path} was trained on a model loaded with {', '.join(unknown)}, which changes "
            f"{hook or 'its hook'}: this version runs models without processing"
        )


def conventions_of(meta: dict[str, Any], card: Card) -> Conventions:
    """What the metadata says, and what the card adds."""
    read = Conventions.from_metadata(meta)
    ours = meta.get("made_by") == "atomscope"
    source = read.source if ours else f"saelens {card.reference}".strip()
    return Conventions(
        **{
            **vars(read),
            "model": read.model or card.model,
            "l0": read.l0 if read.l0 is not None else card.l0,
            "fvu": read.fvu if read.fvu is not None else card.fvu,
            "source": source,
        }
    )
