"""Hugging Face data sets as a stream of documents: hub ids, folders on disk, and `datasets` objects.

hf:owner/name[@config][#split]   streamed from the hub, never downloaded whole (split: train)
a folder of `save_to_disk`, or one of .parquet / .jsonl / .csv files, with [#split] where there are several
No code of a data set is run. The stream ends where `max_tokens` is reached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import DataError, MissingDataError, UsageError

if TYPE_CHECKING:
    from cache.sources import Document, Fields, Source

_PREFIX = "hf:"


def is_hf(source: Any) -> bool:
    """Whether `source` is a data set object, an hf: name, or a folder."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return text.startswith(_PREFIX) or Path(text.partition("#")[0]).is_dir()
    return type(source).__module__.partition(".")[0] == "datasets"


def open_hf(source: Any, fields: Fields) -> Source:
    """The data set as a source; DataError or MissingDataError where it cannot be opened."""
    from cache.sources import Source

    if not isinstance(source, str | os.PathLike):
        name = getattr(getattr(source, "info", None), "dataset_name", None) or "dataset"
        return Source(name=name, key=None, documents=_documents(_one_split(source, None), fields, name))
    text, _, split = os.fspath(source).partition("#")
    if text.startswith(_PREFIX):
        name, _, config = text.removeprefix(_PREFIX).partition("@")
        data = _load(name, config or None, split or "train")
    else:
        name, data = Path(text).name, _folder(Path(text), split or None)
    return Source(name=name, key=None, documents=_documents(data, fields, name))


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets

    if not name:
        raise UsageError("hf: needs a data set, for example hf:owner/name@config#train")
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as e:  # the hub client and the builders raise a family of errors
        raise MissingDataError(
            f"no data set {name!r} (config {config}, split {split}): {_first_line(e)}; check the name and the network"
        ) from e


def _folder(path: Path, split: str | None) -> Any:
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _one_split(datasets.load_from_disk(str(path)), split)
        return _one_split(datasets.load_dataset(str(path), streaming=True), split)
    except UsageError:
        raise
    except Exception as e:
        raise DataError(f"{path} is not a data set that can be read ({_first_line(e)})") from e


def _one_split(data: Any, split: str | None) -> Any:
    """A split of a DatasetDict: the named one, or the only one."""
    if not isinstance(data, dict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise UsageError(
            f"the data set has the splits {', '.join(data)}: name one, e.g. path#{next(iter(data))}"
        )
    return data[split]


def _documents(data: Any, fields: Fields, name: str) -> Iterator[Document]:
    from cache.sources import read_row

    for i, row in enumerate(data):
        yield read_row(row, fields, f"{name} row {i}", name)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
