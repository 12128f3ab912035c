"""Language models with named hooks: load one, capture activations, edit them, look at logits.

A model is a packaged asset, a local Hugging Face folder or a hub id, always from safetensors and without remote
code. Two backends give the same numbers under the same hook names: TransformerLens's bridge and nnsight, both on
eager attention. Activations are [B, T, d] in the dtype of the forward pass; heads are concatenated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache.assets import ASSETS, names, nearest
from cache.convert import RECORD, converted, quiet_transformers, weights_sha256
from cache.devices import default_device, known_device
from cache.errors import DataError, MissingDataError, UsageError
from cache.fast_linear import use_fast_products
from cache.hooks import Edit, probe_tokens
from cache.products import product
from cache.vocab import template_sha256, tokenizer_sha256
from cache.workspace import read_json, workspace_path

BACKENDS = ("transformer_lens", "nnsight")
ATTENTION = "eager"
_ROUND_TRIP = "The 2 quick foxes, it's said, jump."


class LanguageModel:
    """A causal language model with hooks; made by `load_model`."""

    def __init__(
        self, name: str, hf: nn.Module, tokenizer: Any, path: Path, *, backend: str, weights_sha: str
    ) -> None:
        config: Any = hf.config
        self.name, self.backend, self.hf, self.tokenizer = name, backend, hf, tokenizer
        self.source = name
        """What `load_model` takes to load it again: a packaged name, an absolute folder or a hub id."""
        self.device, self.dtype = next(hf.parameters()).device, next(hf.parameters()).dtype
        self.d_model = int(config.get_text_config().hidden_size)
        self.n_layers = int(config.get_text_config().num_hidden_layers)
        self.max_context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.identity: dict[str, Any] = {
            "model": name,
            "weights_sha256": weights_sha,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "template_sha256": template_sha256(tokenizer),
            "backend": backend,
            "attn_implementation": ATTENTION,
            "forward_dtype": str(self.dtype).removeprefix("torch."),
        }
        head: Any = hf.get_output_embeddings()  # type: ignore[operator]
        self._unembed: Tensor = head.weight
        self.d_vocab = int(self._unembed.shape[0])
        self._final_norm = _FinalNorm(hf)
        self.running = threading.RLock()
        """Held during a pass: hooks of a pass in one thread must not see the activations of another's."""
        self.edits_open = 0
        """Contexts of `hooked` that are open."""
        self._backend: Any = self._make_backend(path)
        use_fast_products(hf)  # the bridge adds layers of its own
        hf.requires_grad_(False)  # the bridge turns gradients of the weights on
        self._check()

    def _make_backend(self, path: Path) -> Any:
        probe = probe_tokens(self.d_vocab, self.device)
        if self.backend == "nnsight":
            from cache.backend_nnsight import NNsightBackend

            return NNsightBackend(self.hf, probe)
        from cache.backend_tl import TransformerLensBackend

        return TransformerLensBackend(self.hf, str(path), self.tokenizer, probe)

    def __repr__(self) -> str:
        size = f"{self.n_layers} layers, d_model {self.d_model}, {self.d_vocab} tokens"
        return f"LanguageModel({self.name!r}, {self.backend}, {size}, {self.dtype}, {self.device})"

    # ------------------------------------------------------------------ hooks

    def hook_names(self) -> list[str]:
        """Every hook that holds one vector per token, in the order of execution."""
        return list(self._backend.dims)

    def d_hook(self, name: str) -> int:
        """Width of the vectors at a hook."""
        self.check_hook(name)
        return self._backend.dims[name]

    def check_hook(self, name: str) -> None:
        """UsageError with the nearest names if the model has no such hook."""
        if name not in self._backend.dims:
            options = nearest(name, self.hook_names())
            raise UsageError(
                f"{self.name} has no hook {name!r} ({self.n_layers} layers): did you mean {', '.join(options)}?"
            )

    def _inputs(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        if tokens.ndim != 2:
            raise UsageError(f"tokens have shape {tuple(tokens.shape)}: give int64 [batch, length]")
        tokens = tokens.to(self.device)
        if attention_mask is None:
            return tokens, {}
        mask = attention_mask.to(self.device)
        # With padding on the left a sequence still starts at position 0.
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return tokens, {"attention_mask": mask, "position_ids": positions}

    def capture(
        self, tokens: Tensor, hooks: Sequence[str] | str, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations [B, T, d] at `hooks`, without gradients; the forward pass stops after the deepest one.

        Rows padded on the right need no mask: attention is causal, so no real token sees the padding.
        """
        wanted = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
        if not wanted:
            raise UsageError("no hooks to capture: name at least one, e.g. 'blocks.0.hook_resid_post'")
        for name in wanted:
            self.check_hook(name)
        tokens, inputs = self._inputs(tokens, attention_mask)
        with self.running:
            return self._backend.capture(tokens, wanted, inputs)

    @contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[LanguageModel]:
        """Replace activations while the context is open: `fn(x [B, T, d])` returns the new x, or None.

        Gradients flow through the edits. Contexts nest; edits of one hook run in the order they were opened.
        """
        for name in edits:
            self.check_hook(name)
        with ExitStack() as stack:
            with self.running:
                stack.enter_context(self._backend.hooked(edits))
                self.edits_open += 1
            try:
                yield self
            finally:
                self.edits_open -= 1

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        past: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits [B, T, V] and the key-value cache (None unless `use_cache`), under the active edits.

        With `past`, `tokens` are the new ones only, and a mask covers the old ones too.
        """
        tokens, inputs = self._inputs(tokens, attention_mask)
        with self.running:
            out = self._backend.forward(tokens, {**inputs, "past_key_values": past, "use_cache": use_cache})
        return out.logits, (out.past_key_values if use_cache else None)

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]."""
        return self.forward(tokens, attention_mask)[0]

    @torch.no_grad()
    def logit_lens(self, directions: Tensor) -> Tensor:
        """[n, d_model] directions of the residual stream → their direct effect on the logits, [n, V].

        (direction · gain of the final norm) @ W_U: the linear part of the direct path, with no division by the
        norm of the stream, so only the order and the ratios of the values mean something.
        """
        if directions.ndim != 2 or directions.shape[1] != self.d_model:
            raise UsageError(
                f"directions have shape {tuple(directions.shape)}: the logit lens takes [n, {self.d_model}]"
            )
        x = self._final_norm.linear_part(directions.to(self.device, torch.float32))
        return product(x, self._unembed.float().T)

    # ------------------------------------------------------------ self-checks

    def _check(self) -> None:
        """What must hold for any number computed with this model to mean something."""
        vocab = max(self.tokenizer.get_vocab().values())
        if vocab >= self.d_vocab:
            raise DataError(
                f"{self.name}: the tokenizer has ids up to {vocab}, the model knows {self.d_vocab}: "
                "tokenizer and model do not belong together"
            )
        text = self.tokenizer.decode(self.tokenizer(_ROUND_TRIP, add_special_tokens=False).input_ids)
        if "".join(text.lower().split()) != "".join(_ROUND_TRIP.lower().split()):
            raise DataError(
                f"{self.name}: the tokenizer turns {_ROUND_TRIP!r} into {text!r}: its files are broken"
            )
        probe = probe_tokens(self.d_vocab, self.device)
        with torch.inference_mode():
            logits = self(probe)
        if not logits.isfinite().all():
            raise DataError(
                f"{self.name}: the logits are not finite: the weights are damaged, or overflow {self.dtype}"
            )
        half = probe.shape[1] // 2
        if not torch.allclose(logits[0, :half], logits[1, :half], rtol=1e-2, atol=1e-2 * float(logits.std())):
            raise DataError(f"{self.name} looks ahead: later tokens change earlier logits; it must be causal")
        self._check_residuals(probe)

    def _check_residuals(self, probe: Tensor) -> None:
        resid = [f"blocks.{i}.hook_resid_{side}" for i in range(self.n_layers) for side in ("pre", "post")]
        missing = [h for h in resid if h not in self._backend.dims]
        if missing:
            raise DataError(f"{self.name}: {self.backend} finds no {missing[0]}: try the other backend")
        streams = self.capture(probe, resid)
        for left, right in zip(resid[1::2], resid[2::2]):
            if not torch.equal(streams[left], streams[right]):
                raise DataError(
                    f"{self.name}: {left} differs from {right}: these are not the residual stream"
                )


class _FinalNorm:
    """The last norm as a linear map, without its division."""

    def __init__(self, hf: nn.Module) -> None:
        base: Any = getattr(hf, str(hf.base_model_prefix), hf)
        options = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
        norm = next((getattr(base, o) for o in options if getattr(base, o, None) is not None), None)
        if norm is None:
            raise UsageError(f"{type(hf).__name__} has no final norm that is known ({', '.join(options)})")
        self.centres = isinstance(norm, nn.LayerNorm)
        weight: Tensor = norm.weight.detach()
        if self.centres:
            self.gain = weight.float()
        else:
            # The response to a constant vector is the gain itself, also where it is stored as gain − 1 (Gemma).
            with torch.no_grad():
                constant = torch.full_like(weight, 1024.0)[None, None]
                self.gain = norm(constant)[0, 0].float()

    def linear_part(self, x: Tensor) -> Tensor:
        if self.centres:
            x = x - x.mean(dim=-1, keepdim=True)
        return x * self.gain


def load_model(
    name: str | os.PathLike[str],
    *,
    backend: str = "transformer_lens",
    workspace: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Load a packaged model, a local Hugging Face folder or a hub id; float32 unless `dtype` says otherwise."""
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}: choose {' or '.join(BACKENDS)}")
    place = default_device() if device is None else known_device(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _resolve(str(name), workspace)
    known = read_json(path / RECORD) if (path / RECORD).exists() else {}
    weights_sha = known.get("weights_sha256") or weights_sha256(path)
    # A folder goes by its own name, wherever it lies, so that moving it does not change the identity.
    label = str(known.get("model") or (path.name if Path(name).expanduser().is_dir() else name))
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        hf = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or torch.float32,
            attn_implementation=ATTENTION,
            local_files_only=True,
            use_safetensors=True,
        )
        hf = hf.eval().to(place)
        use_fast_products(hf)
        model = LanguageModel(label, hf, tokenizer, path, backend=backend, weights_sha=weights_sha)
    folder = Path(name).expanduser()
    model.source = str(folder.resolve()) if folder.is_dir() else str(name)
    return model


def load_tokenizer(name: str | os.PathLike[str], *, workspace: str | os.PathLike[str] | None = None) -> Any:
    """The tokenizer of a model alone, by the same names as `load_model`."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(_resolve(str(name), workspace), local_files_only=True)


def _resolve(name: str, workspace: str | os.PathLike[str] | None) -> Path:
    """Local folder of a model by name: packaged, a path, in the local hub cache, or from the hub."""
    if name in ASSETS and ASSETS[name].kind == "model":
        return converted(ASSETS[name], workspace_path(workspace))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise MissingDataError(f"{folder} has no config.json: give a Hugging Face model folder")
        return folder
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    hint = f"the packaged models are {', '.join(nearest(name, names('model')))}; else give a folder or owner/name"
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (HFValidationError, ValueError) as e:
        raise UsageError(f"no model {name!r}: {hint}") from e
    except OSError as e:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UsageError(f"no model {name!r}: {hint}") from e
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the hub client raises a family of network and permission errors
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UsageError(f"no model {name!r} on this machine, nor from the hub ({reason}): {hint}") from e
