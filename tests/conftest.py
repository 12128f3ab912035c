"""Fixtures shared by all tests: a tiny model on disk, the same loaded, and the packaged real model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model_dir

pytest.register_assert_rewrite("tests.rings")

REAL_MODEL = "smollm2-135m-instruct-q4_1"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the tiny random Llama."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_model(tiny_dir: Path) -> Any:
    """The tiny model on the default backend."""
    from cache.models import load_model

    return load_model(tiny_dir, device="cpu")


@pytest.fixture(scope="session")
def real_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the packaged model converted: $ATOMSCOPE_TEST_HOME if set, else a temporary one."""
    from cache.assets import ASSETS
    from cache.convert import converted
    from cache.workspace import workspace_path

    home = os.environ.get("ATOMSCOPE_TEST_HOME")
    root = workspace_path(home or tmp_path_factory.mktemp("real"))
    converted(ASSETS[REAL_MODEL], root)
    return root
