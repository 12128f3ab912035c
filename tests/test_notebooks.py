"""Every notebook runs from top to bottom on the tiny model, and is committed without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import SENTENCES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tiny_dir: Path, tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "sentences.txt"
    text.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    values = {
        "MODEL": str(tiny_dir), "SOURCE": str(text), "HOOK": "blocks.1.hook_resid_post", "MAX_TOKENS": 5000,
        "CONTEXT": 64, "D_SAE": 128, "K": 4, "STEPS": 60, "BATCH": 128, "WORKSPACE": str(tmp_path / "space"),
        "WORD": "the", "PROMPT": "The cat",
    }  # fmt: skip
    book = nbformat.read(path, as_version=4)
    first = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    first.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
