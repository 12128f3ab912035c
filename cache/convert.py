"""A packaged GGUF model as a Hugging Face folder: de-quantised to float32 once, then loaded like any other.

transformers reads the GGUF (and undoes its permutation of the query and key rows) but cannot save the result, so
the weights are moved, strictly by name, into a fresh model of the same configuration. About a minute, 12 bytes of
memory a parameter (1.6 GB for SmolLM2-135M, 3.2 GB for Gemma 3 270M), 4 bytes a parameter on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.assets import Asset, sha256_file, write_model_file
from cache.errors import DataError
from cache.licences import require_accepted
from cache.provenance import provenance
from cache.workspace import atomic_dir, write_json

RECORD = "atomscope.json"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers; what matters is raised or checked."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def weights_sha256(folder: Path) -> str:
    """Hash of all safetensors files of a model folder, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"{folder} has no .safetensors weights: pickled weights are not read; save the model with "
            "save_pretrained(…) first"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def converted(asset: Asset, workspace: Path) -> Path:
    """Folder of the packaged model, converted on first use."""
    folder = workspace / "assets" / "models" / asset.name
    require_accepted(asset, workspace)
    if not (folder / RECORD).exists():
        _convert(asset, folder, workspace)
    return folder


def _convert(asset: Asset, folder: Path, workspace: Path) -> None:
    started = time.time()
    with atomic_dir(folder) as out:
        with tempfile.TemporaryDirectory(dir=workspace / "_tmp") as tmp:
            gguf = Path(tmp) / "model.gguf"
            gguf_sha = write_model_file(asset, workspace, gguf)
            print(f"converting {asset.name} (once, about a minute)", file=sys.stderr, flush=True)
            with quiet_transformers():
                model, tokenizer = _rebuild(gguf)
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
        record = {
            "schema_version": 1,
            "model": asset.name,
            "wheel_sha256": asset.sha256,
            "gguf_sha256": gguf_sha,
            "weights_sha256": weights_sha256(out),
            "licence": asset.licence,
            "provenance": provenance(started=started, package=f"{asset.package}=={asset.version}"),
        }
        write_json(out / RECORD, record)


def _rebuild(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = type(read)(type(read.config)(**config)).float()
    model.load_state_dict(read.state_dict(), strict=True)
    model.tie_weights()
    return model, tokenizer
