"""Codes of a dictionary without an encoder: orthogonal matching pursuit, and basis pursuit.

    matching   k times: the atom with the largest |<d, r>| joins, all coefficients are refitted      x ~ z D, ||z||_0 <= k
    basis      min sum_i |z_i|  subject to  z D = m  (z >= 0 where one-sided), a linear program (HiGHS)

Atoms are unit in the geometry they are given in. `recovers` asks whether basis pursuit gives back the very code that made
m: exact l1 recovery, which mu < 1 / (2 K - 1) guarantees for every code of K atoms and which mostly goes much further.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cache.products import product

RECOVERED = 1e-4
SPANNED = 1e-6
BASIS_BYTES = 2**28


@torch.inference_mode()
def matching_pursuit(x: Tensor, atoms: Tensor, k: int, *, batch: int = 512) -> Tensor:
    """What k atoms keep of each row: the fit `[B, d]` of rows x by unit atoms `[n, d]`; k at most n and d.

    Each atom that joins is made orthogonal to those before it (twice, against rounding), so a refit is one projection:
    k^2 d operations a row.
    """
    k = min(k, *atoms.shape)
    batch = min(batch, max(1, BASIS_BYTES // (8 * max(k, 1) * atoms.shape[1])))
    return torch.cat([_pursue(rows, atoms, k) for rows in x.float().split(batch)])


def _pursue(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    residual, chosen = x.double(), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    basis = residual.new_zeros(len(x), k, x.shape[1])
    for i in range(k):
        size = product(residual.float(), atoms.T).abs().scatter_(1, chosen, -1.0)
        best = size.argmax(1, keepdim=True)
        chosen = torch.cat([chosen, best], dim=1)
        new, before = atoms[best[:, 0]].double(), basis[:, :i]
        for _ in range(2):
            inner = torch.einsum("bid,bd->bi", before, new)
            new = new - torch.einsum("bi,bid->bd", inner, before)
        norm = torch.linalg.vector_norm(new, dim=1, keepdim=True)
        # an atom that the others span adds nothing
        basis[:, i] = torch.where(norm > SPANNED, new / norm, 0.0)
        residual = residual - (residual * basis[:, i]).sum(1, keepdim=True) * basis[:, i]
    return (x - residual).to(x.dtype)


def basis_pursuit(m: np.ndarray, atoms: np.ndarray, *, signed: bool) -> np.ndarray | None:
    """The code `[n]` of least l1 norm with z @ atoms = m, or None where the program has no solution."""
    from scipy.optimize import linprog

    columns = np.asarray(atoms, dtype=np.float64).T
    columns = np.concatenate([columns, -columns], axis=1) if signed else columns
    found = linprog(np.ones(columns.shape[1]), A_eq=columns, b_eq=m, bounds=(0, None), method="highs")
    if found.x is None:
        return None
    half = found.x.reshape(2, -1) if signed else found.x[None]
    return half[0] - half[1] if signed else half[0]


def recovers(code: np.ndarray, atoms: np.ndarray, *, signed: bool) -> bool:
    """Whether basis pursuit returns `code` `[n]` from code @ atoms, to RECOVERED of its largest value."""
    code = np.asarray(code, dtype=np.float64)
    found = basis_pursuit(code @ np.asarray(atoms, dtype=np.float64), atoms, signed=signed)
    return found is not None and bool(np.abs(found - code).max() <= RECOVERED * np.abs(code).max())
