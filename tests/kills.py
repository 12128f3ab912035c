"""A run that ends at a checkpoint, as a kill ends it: what is on disk is all that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from saes import training


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The training inside is interrupted right after its checkpoint of `step`; it is an error if it is not."""
    real = training.save_checkpoint

    def killed(run: Path, checkpoint: Any) -> Path:
        path = real(run, checkpoint)
        if checkpoint.step == step:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", killed)
        yield
