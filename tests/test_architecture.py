"""The import rules: a lower layer that reaches up, or a browser that waits for torch, is found here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["cache", "saes", "probes", "steering", "app"]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_one_above_it(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, path


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import saes, saes.sae, saes.training, saes.evaluation, saes.indexing", "transformers"),
        ("from saes import FeatureIndex; import cache.catalog, saes.views, app.figures, app.state", "torch"),
        ("import app.cli", "torch"),
        ("import probes.views, probes.attribution.report, app.figures_attribution", "torch"),
        ("import cache, cache.corpus", "torch"),
    ],
)
def test_light_imports_stay_light(code: str, absent: str) -> None:
    check = f"import sys; {code}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0, f"{code} imports {absent}"


def test_nothing_unpickles() -> None:
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            assert not imported(path) & {"pickle", "joblib", "dill", "cloudpickle"}, path
            text = path.read_text(encoding="utf-8")
            if path.relative_to(ROOT).as_posix() == "saes/foreign/convert.py":
                # `atomscope sae convert`: the user's explicit order, tensors only
                assert text.count("torch.load(") == text.count("weights_only=True)") == 1
                continue
            assert "torch.load(" not in text, path
