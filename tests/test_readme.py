"""The README's commands and Python snippet run as they stand, on the packaged model, with smaller numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALLER = {"212000": "4000", "212_000": "4000", "4608": "1200", "1500": "60", "2048": "256"}


def block(kind: str) -> str:
    """The code block after `<!-- runs: kind -->`, with the smaller numbers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- runs: {kind} -->\n```\w+\n(.*?)```", text, re.S)
    assert found, f"README has no block marked {kind}"
    code = found[1]
    for old, new in SMALLER.items():
        assert old in text
        code = code.replace(old, new)
    return code


def environment(workspace: Path) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return os.environ | {
        "ATOMSCOPE_HOME": str(workspace), "PYTHONPATH": str(ROOT), "PATH": scripts + os.pathsep + os.environ["PATH"],
    }  # fmt: skip


@pytest.mark.assets
def test_readme_commands_run(real_workspace: Path) -> None:
    command = f'set -e\natomscope() {{ {sys.executable} -m app.cli "$@"; }}\n' + block("cli")
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(real_workspace), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("held-out FVU", "feature 7", "steered:"):
        assert words in done.stdout


@pytest.mark.assets
def test_readme_python_runs(real_workspace: Path, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(block("python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment(real_workspace)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fvu" in done.stdout and "tensor(" in done.stdout


def test_readme_names_only_commands_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z][a-z0-9-]*)", text)) <= targets
