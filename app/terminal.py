"""Features and machine facts as plain text for the terminal."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from cache.provenance import git_commit, versions

GLYPHS = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def feature_text(index: Any, feature: dict[str, Any], contexts: list[Any]) -> str:
    """Header, top contexts with the firing token in brackets, and the logit lens."""
    n = int(feature["feature"])
    density = feature["density"]
    often = f"{density:.3%} of tokens, 1 in {1 / density:,.0f}" if density else "silent on this store"
    lines = [
        f"feature {n}  {feature['label'] or 'no label yet'}",
        f"{often}   largest {feature['max_act']:.2f}   smallest {feature['min_act']:.2f}",
        f"{index.meta['name']} at {index.meta['hook']} of {index.meta['model']}",
        "",
    ]
    for e in contexts:
        tokens = [t.translate(GLYPHS) for t in e.tokens]
        tokens[e.centre] = f"[{tokens[e.centre]}]"
        times = f"  x{e.repeats}" if e.repeats > 1 else ""
        lines.append(f"{e.value:+8.2f}  {''.join(tokens)}{times}")
    logits = index.logits(n)
    if len(logits):
        lines.append("")
        for side, word in (("top", "raises"), ("bottom", "lowers")):
            part = logits[logits["side"] == side]
            words = "  ".join(
                f"{t.translate(GLYPHS)!r} {v:+.2f}" for t, v in zip(part["token"], part["value"])
            )
            lines.append(f"{word}: {words}")
    return "\n".join(lines)


def comparison_lines(records: list[dict[str, Any]]) -> list[str]:
    """Matched decoders, one line a pair and side."""
    if not records:
        return []
    lines = [
        f"{'features of':<26}{'matched with':<26}{'n':>7}{'cos':>7}{'> .7':>7}{'> .9':>7}{'mutual':>8}{'chance':>8}"
    ]
    for r in records:
        for side, other in (("a", "b"), ("b", "a")):
            s, (x, y) = r["sides"][side], (f"{r[k]['name']} {r[k]['sae_id'][:6]}" for k in (side, other))
            lines.append(
                f"{x:<26}{y:<26}{s['n']:>7,}{s['mean_cos']:>7.3f}{s['over_0.7']:>7.1%}{s['over_0.9']:>7.1%}"
                f"{s['mutual']:>8.1%}{r['chance']:>8.3f}"
            )
    how = {"hungarian": "one to one, largest total cosine", "mutual": "each other's nearest"}
    return [
        *lines,
        f"matching: {how[records[0]['method']]}; chance: nearest of as many random directions",
        "",
    ]


def frontier_lines(table: Any) -> list[str]:
    """L0, FVU and delta CE of all evaluated SAEs; a star marks what no other on the same store beats."""
    if not len(table):
        return ["no evaluation yet: run `atomscope evaluate` on the SAEs first"]
    lines = [f"{'SAE':<34}{'store':<10}{'L0':>8}{'FVU':>9} {'delta CE':>9} {'95 % interval':>17}"]
    for r in table.to_dict("records"):
        name = f"{r['name']} {r['sae_id'][:6]}" if r["subject"] == "sae" else f"  {r['subject']}"
        name += "" if r["skip"] == "first" else f", skip {r['skip']}"
        cells = [f"{r[m]:.{d}f}" if r[m] == r[m] else "" for m, d in (("l0", 1), ("fvu", 4), ("delta_ce", 3))]
        interval = (
            f"{r['ci_low']:.3f} to {r['ci_high']:.3f}" if r["ci_low"] == r["ci_low"] and r["ci_low"] else ""
        )
        stars = ["*" if r[m] else " " for m in ("best_fvu", "best_ce")]
        lines.append(
            f"{name:<34}{r['store'][:8]:<10}{cells[0]:>8}{cells[1]:>9}{stars[0]}{cells[2]:>9}{stars[1]}{interval:>17}"
        )
    return [*lines, "* no other SAE on this store is better at this L0"]


def class_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The SAE on each kind of token: log2 and plain MSE, error over the row's own size, L0."""
    values = {tuple(r["metric"].split("@")): r for r in rows if r["subject"] == "sae" and "@" in r["metric"]}
    classes = list(dict.fromkeys(name for _, name in values))
    lines = [f"\n{'tokens':<14}{'n':>9}{'log2 MSE':>10}{'MSE':>12}{'NMSE':>9}{'L0':>8}"]
    for name in classes:
        log2, mse, nmse, l0 = (values[m, name]["value"] for m in ("log2_mse", "mse", "nmse", "l0"))
        n = values["mse", name]["n"]
        lines.append(f"{name:<14}{n:>9,}{log2:>10.2f}{mse:>12.4g}{nmse:>9.4f}{l0:>8.1f}")
    return lines


def doctor_report(workspace: Path) -> dict[str, Any]:
    """Versions, cores, device, free disk and the workspace."""
    import torch

    disk = shutil.disk_usage(workspace)
    return versions() | {
        "git commit": git_commit() or "not a checkout",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "workspace": str(workspace),
        "free disk, GiB": round(disk.free / 2**30, 1),
    }
