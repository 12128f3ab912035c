"""Python scripts in processes of their own, for tests that kill them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def started(script: str, *args: object) -> subprocess.Popen[bytes]:
    """The script under this Python, on one thread, with the project's packages; its errors go nowhere."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], env=env, stderr=subprocess.DEVNULL
    )
