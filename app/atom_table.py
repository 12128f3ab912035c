"""The atoms of an SAE beside their controls, as a table: subjects down, the measures of `saes.evaluate_atoms` across."""

from __future__ import annotations

import re
from typing import Any

PREFIX = "atoms:"
MEASURES = {
    "l0": ("L0", "{:.1f}"),
    "q_star": ("q*", "{:.4f}"),
    "excess_random": ("over random", "{:+.4f}"),
    "excess_tight": ("over tight", "{:+.4f}"),
    "q_star_euclid": ("q*, Euclid", "{:.4f}"),
    "r2_train": ("R² train", "{:.3f}"),
    "r2_heldout": ("held-out", "{:.3f}"),
    "pursuit_r2_train": ("pursuit train", "{:.3f}"),
    "pursuit_r2_heldout": ("held-out", "{:.3f}"),
    "l1_recovery": ("ℓ₁ recovery", "{:.2f}"),
}
NAMES = {
    "sae": "SAE",
    "random": "random unit atoms",
    "tight-frame": "tight frame",
    "pca": "PCA",
    "kmeans": "k-means",
}
TOPK = re.compile(r"topk-(\d+)")
"""The TopK SAE of the same width and L0, by its k."""
HEAD = ("", *(title for title, _ in MEASURES.values()))


def atom_table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One tuple of texts a subject, the SAE first; empty where the atoms were never measured."""
    values = {(r["subject"], r["metric"]): r["value"] for r in rows if r["subject"].startswith(PREFIX)}
    subjects = dict.fromkeys(s for s, _ in values)
    names = {s: _name(s.removeprefix(PREFIX)) for s in subjects}
    order = sorted(subjects, key=lambda s: (s != f"{PREFIX}sae", names[s] != s.removeprefix(PREFIX)))
    out = []
    for subject in order:
        cells = [
            form.format(values[subject, m]) if (subject, m) in values else ""
            for m, (_, form) in MEASURES.items()
        ]
        out.append((names[subject], *cells))
    return out


def _name(subject: str) -> str:
    """For people; that of an SAE which was named to stand beside is its own."""
    if match := TOPK.fullmatch(subject):
        return f"TopK, k {match[1]}"
    return NAMES.get(subject, subject)


def atom_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table for the terminal, and what the geometry was estimated from."""
    table = [HEAD, *atom_table(rows)]
    widths = [max(len(r[i]) for r in table) + 2 for i in range(len(HEAD))]
    lines = [
        "".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        for r in table
    ]
    values = {r["metric"]: r for r in rows if r["subject"] == f"{PREFIX}sae"}
    if "aip_condition" not in values:
        return lines
    return [
        *lines,
        f"AIP of {values['aip_condition']['n']:,} train rows: condition {values['aip_condition']['value']:.3g}, pairwise "
        f"angles centred at {values['aip_angle_centre']['value']:.1f}° (plain {values['aip_angle_centre_euclid']['value']:.1f}°), "
        f"{values['aip_angle_change']['value']:.3f} between halves",
    ]
