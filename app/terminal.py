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
