"""The SAE module: its tensors, `encode` to Codes, `decode` back, `save` and `load` in SAELens's file layout.

Weights are rows per latent in memory, `W_enc, W_dec [d_sae, d_model]`; SAELens's transposed encoder exists at the
file boundary only (saes/files.py). A saved SAE is folded: it takes raw activations and its codes are in their units.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from cache.devices import known_device
from cache.errors import DataError
from cache.workspace import canonical_json
from saes.activations import encode
from saes.codes import Codes
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.kernels import decode_rows


class SAE(nn.Module):
    """Sparse autoencoder `x_hat = sum_j z_j W_dec[j] + b_dec` with `z = act((x - b_dec) W_enc^T + b_enc)`.

    A transcoder (cfg.d_out) predicts other activations, `[d_out]` wide like W_dec's rows and b_dec, and subtracts nothing
    from its input: `z = act(x W_enc^T + b_enc)`. What training centred the input by stands in b_enc.

    Parameters (float32): W_enc, W_dec `[d_sae, d_model]`, b_enc `[d_sae]`, b_dec `[d_model]`; threshold `[d_sae]` >= 0
    of jumprelu and batch_*; r_mag and b_mag `[d_sae]` of gated, whose b_enc is the bias of the gate.
    """

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        if cfg.d_model < 1:
            raise DataError("SAEConfig.d_model is not set: `train` fills it in, or give it by hand")
        self.cfg = cfg
        self.conventions = Conventions(model=cfg.model)
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_model))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.width_out))
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out))
        if cfg.has_threshold:
            self.threshold = nn.Parameter(torch.zeros(cfg.d_sae))
        if cfg.activation == "gated":
            self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae))
            self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae))

    def encode(self, x: Tensor) -> Codes:
        """Codes of x `[..., d_model]` (leading axes flattened to rows): values float32 and indices int32, `[B, k]` for
        topk and abs_topk, flat with offsets for the rest (`saes.activations` has the rules). x may be a numpy array.

        Differentiable where x or a parameter asks for gradients. Raises DataError on a wrong width.
        """
        return encode(self, self._rows(x))

    @property
    def centre(self) -> Tensor:
        """What is subtracted from the input: b_dec, or zeros `[d_model]` in a transcoder."""
        return self.W_enc.new_zeros(self.cfg.d_model) if self.cfg.transcoder else self.b_dec

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Reconstruction `[B, d_model]` (transcoder: `[B, d_out]`) of codes; rows with no activation give b_dec.

        Dense activations `[..., d_sae]` are taken too, and keep their leading axes.
        """
        if not isinstance(codes, Codes):
            return self._dense(codes) @ self.W_dec + self.b_dec
        return decode_rows(codes.values, codes.indices, self.W_dec, codes.offsets) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction with the shape of x; a transcoder's output has d_out in the last place."""
        return self.decode(self.encode(x)).view(*x.shape[:-1], self.cfg.width_out)

    def _dense(self, z: Any) -> Tensor:
        z = as_tensor(z)
        if not isinstance(z, Tensor) or z.shape[-1:] != (self.cfg.d_sae,):
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise DataError(f"decode takes Codes, or a tensor [..., d_sae={self.cfg.d_sae}], got {got}")
        return z.to(self.W_dec)

    def _rows(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            x = as_tensor(x)
            if not isinstance(x, Tensor):
                raise DataError(
                    f"this SAE takes a tensor [..., d_model={self.cfg.d_model}], got {type(x).__name__}: torch.as_tensor(x)"
                )
            x = x.to(self.W_enc.device)
        if x.shape[-1:] != (self.cfg.d_model,):
            raise DataError(
                f"this SAE takes activations of width d_model={self.cfg.d_model} (hook {self.cfg.hook or 'unknown'}), "
                f"got shape {tuple(x.shape)}: use the model and hook it was trained on"
            )
        return x.reshape(-1, self.cfg.d_model).to(self.W_enc.dtype)

    @property
    def sae_id(self) -> str:
        """Content id, 16 hex digits: architecture, hook, model and the float32 tensors. Labels key on it."""
        cfg = self.cfg
        rule = {
            "architecture": cfg.activation,
            "k": cfg.k,
            "d_model": cfg.d_model,
            "d_sae": cfg.d_sae,
            "hook": cfg.hook,
            "model_sha": cfg.model_sha,
            "b_dec": "subtracted from the input",
            "input": "unit norm of x - b_dec" if cfg.space == "unit" else "raw",
        }
        if cfg.transcoder:
            rule |= {"b_dec": "added to the output", "out_hook": cfg.out_hook, "d_out": cfg.d_out}
        digest = hashlib.sha256(canonical_json(rule).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` into the folder `path` (atomic). Returns the folder."""
        from saes.files import save_sae

        return save_sae(self, Path(path))

    @classmethod
    def load(
        cls, reference: str | Path, *, device: str | torch.device = "cpu", norm_factor: float | None = None
    ) -> Self:
        """Read a folder or "release:id": SAELens's layout (ours or its own), sparsify, Gemma Scope (docs/interop.md).

        Unknown architectures and keys are refused. `norm_factor` is the factor that the rows had in training, for files
        that leave it out.
        """
        from saes.foreign.loading import load

        return load(cls, reference, device=known_device(device), norm_factor=norm_factor)


def as_tensor(x: Any) -> Any:
    """A numpy array of numbers as a tensor, float64 or float32; anything else as it is."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub":
        return x
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    return torch.from_numpy(np.require(x, dtype, ["C", "W"]))


@torch.no_grad()
def fold_input_scale(sae: SAE, scale: float) -> None:
    """Turn an SAE trained on `scale * x` into the same SAE on raw x, in place.

    With u' = (s x - b_dec') W^T + b_enc' and unit decoder rows, u = u' / s: everything in units of u or x (b_enc,
    b_mag, thresholds, b_dec) is divided by s; W_enc, W_dec and r_mag stay, and the selected latents do not change.
    """
    for name in ("b_enc", "b_mag", "threshold", "b_dec"):
        if hasattr(sae, name):
            getattr(sae, name).div_(scale)


@torch.no_grad()
def fold_transcoder(sae: SAE, scale: float, scale_out: float, shift: Tensor) -> None:
    """Turn a transcoder trained from `scale * x - shift` to `scale_out * y` into the same one from raw x to y, in place.

    Decoder rows stay unit, so codes come out in units of y: all that makes u is divided by scale_out, and the shift goes
    into the bias, b_enc - W_enc shift (gated: into b_mag as well). The selected latents do not change.
    """
    lost = sae.W_enc @ shift
    sae.b_enc.sub_(lost).div_(scale_out)
    sae.W_enc.mul_(scale / scale_out)
    sae.b_dec.div_(scale_out)
    if hasattr(sae, "b_mag"):
        sae.b_mag.sub_(sae.r_mag.exp() * lost).div_(scale_out)
    if hasattr(sae, "threshold"):
        sae.threshold.div_(scale_out)


@torch.no_grad()
def fold_whitening(sae: SAE, root: Tensor, inverse: Tensor) -> None:
    """Turn an SAE trained on `x root` into the same SAE on raw x, in place; root and inverse symmetric, float64.

    u = (x root - b') W'^T + b_enc = (x - b' inverse) (W' root)^T + b_enc and x_hat = (z D' + b') inverse: what is in units
    of u stays, so the codes do not change. Decoder rows are no longer unit.
    """

    def times(p: Tensor, m: Tensor) -> Tensor:
        return (p.cpu().double() @ m).to(p)

    sae.W_enc.copy_(times(sae.W_enc, root))
    for p in (sae.W_dec, sae.b_dec):
        p.copy_(times(p, inverse))


@torch.no_grad()
def fix_signs(sae: SAE, sign: Tensor) -> None:
    """Flip (W_enc, b_enc, W_dec) of the latents with sign -1 together: z changes sign, x_hat does not.

    A signed latent has no preferred pole; `train` uses this so that + is the side with the larger sum of activations.
    """
    for p in (sae.W_enc, sae.W_dec):
        p.mul_(sign[:, None])
    sae.b_enc.mul_(sign)
