"""Labels to and from files in Neuronpedia's forms: JSON, JSON lines (also .gz) and CSV.

explanations   a flat list: modelId, layer, index (text), description, typeName, explanationModelName, scores
features       one object a feature: modelId, layer, index, explanations: [description, typeName, ..., scores]
csv            the columns of `explanations`, with score for scores

Ours add sign, author, method, created and sae_id, which Neuronpedia does not know; a row without a sign is about the
positive pole. A row of another SAE, or one that cannot be a label, is refused with its line, and then nothing is
imported. Text cells of a CSV that a spreadsheet would run as a formula get an apostrophe, which import takes off.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.workspace import atomic_file
from saes.labels import append_events, current_labels, make_event

COLUMNS = (
    "modelId", "layer", "index", "description", "typeName", "explanationModelName", "score", "sign", "author",
    "method", "created", "sae_id",
)  # fmt: skip
FORMS = ("explanations", "features")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".csv")
_FORMULA = (*"=+-@\t\r'", "＝", "＋", "－", "＠")
_TEXT_COLUMNS = ("modelId", "layer", "description", "typeName", "explanationModelName", "author", "method")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The SAE that labels belong to, as files name it."""

    sae_id: str
    """Content id of the SAE."""
    model: str
    """Name of the model; `modelId` in files."""
    hook: str
    """Hook; `layer` in files."""
    d_sae: int
    """Number of latents."""
    signed: bool
    """Whether the latents have a negative pole."""

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Target:
        """From the `meta` of a feature index."""
        return cls(sae_id=meta["sae_id"], model=meta["model"], hook=meta["hook"], d_sae=meta["d_sae"],
                   signed=meta["signed"])  # fmt: skip

    @classmethod
    def from_folder(cls, folder: Path) -> Target:
        """From an SAE folder, for an SAE that has no index."""
        from saes.sae import SAE

        sae = SAE.load(folder)
        return cls(sae_id=sae.sae_id, model=sae.cfg.model, hook=sae.cfg.hook, d_sae=sae.cfg.d_sae,
                   signed=sae.cfg.signed)  # fmt: skip

    @property
    def source(self) -> tuple[str, str]:
        return self.model, self.hook


class Imported(NamedTuple):
    """Rows of a file: taken as new labels, already in force, and left out because another label is in force."""

    added: int
    same: int
    kept: int


# ---- export ----


def export_labels(workspace: Path, target: Target, path: Path, *, form: str = "explanations") -> int:
    """Write the labels in force of one SAE to `path`, atomically; the suffix says which kind of file. Returns how many."""
    if form not in FORMS:
        raise UsageError(f"form is one of {', '.join(FORMS)}, not {form!r}")
    suffix = _suffix(path)
    if suffix == ".csv" and form != "explanations":
        raise UsageError("a CSV file has one row an explanation: leave --form out, or write a .json file")
    events = [e for _, e in sorted(current_labels(workspace, target.sae_id).items())]
    rows = [_row(e, target) for e in events]
    if suffix == ".csv":
        text = _csv_text(rows)
    else:
        values = [_with_scores(r) for r in rows]
        values = _by_feature(values) if form == "features" else values
        lines = [json.dumps(v, ensure_ascii=False, allow_nan=False) for v in values]
        text = "[\n" + ",\n".join(lines) + "\n]\n" if suffix == ".json" else "".join(f"{v}\n" for v in lines)
    data = text.encode()
    with atomic_file(path) as tmp:
        tmp.write_bytes(gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data)
    return len(rows)


def _suffix(path: Path) -> str:
    found = [s for s in SUFFIXES if path.name.lower().endswith(s)]
    if not found:
        raise UsageError(f"{path.name} is not a label file: the name ends in {', '.join(SUFFIXES)}")
    return found[-1]


def _row(event: dict[str, Any], target: Target) -> dict[str, Any]:
    kind, _, model = event["method"].partition("@")
    return {
        "modelId": target.model, "layer": target.hook, "index": str(event["feature"]),
        "description": event["text"], "typeName": kind, "explanationModelName": model, "score": event["score"],
        "sign": event["sign"], "author": event["author"], "method": event["method"], "created": event["created"],
        "sae_id": event["sae_id"],
    }  # fmt: skip


def _with_scores(row: dict[str, Any]) -> dict[str, Any]:
    score = row.pop("score")
    name = {
        "explanationScoreTypeName": row["typeName"],
        "explanationScoreModelName": row["explanationModelName"],
    }
    return row | {"scores": [] if score is None else [{"value": score} | name]}


def _by_feature(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shared = ("modelId", "layer", "index", "sae_id")
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        feature = out.setdefault(row["index"], {k: row[k] for k in shared} | {"explanations": []})
        feature["explanations"].append({k: v for k, v in row.items() if k not in shared})
    return list(out.values())


def _csv_text(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {c: guard(row[c]) for c in _TEXT_COLUMNS})
    return out.getvalue()


def guard(text: str) -> str:
    """The text as a cell that no spreadsheet runs."""
    return "'" + text if text.startswith(_FORMULA) else text


def unguard(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


# ---- import ----


def import_labels(
    workspace: Path,
    target: Target,
    path: Path,
    *,
    source: tuple[str, str] | None = None,
    keep_existing: bool = False,
) -> Imported:
    """Append the labels of a file as events. All rows are checked first: a refused row means that nothing is taken.

    source: (modelId, layer) under which the file knows this SAE, where that is not its model and hook.
    keep_existing: leave features alone that have another label in force. Raises DataError with the line of a row that
    is of another SAE or no label.
    """
    rows, current, events = list(read_rows(path)), current_labels(workspace, target.sae_id), []
    same = kept = 0
    for line, row in rows:
        try:
            event = _event(row, target, source or target.source)
        except AtomscopeError as e:
            raise DataError(f"{path}, line {line}: {e}; nothing was imported") from None
        key = (event["sae_id"], event["feature"], event["sign"])
        old = current.get(key)
        if old is not None and all(old[k] == event[k] for k in ("text", "author", "method", "score")):
            same += 1
        elif old is not None and keep_existing:
            kept += 1
        else:
            events.append(event)
            current[key] = event
    append_events(workspace, events)
    return Imported(len(events), same, kept)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, explanation) of each row of a label file; feature objects are taken apart."""
    suffix = _suffix(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if suffix.endswith(".gz") else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise MissingDataError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError(
            f"{path} cannot be read as UTF-8 text ({e}): fetch or export the file again"
        ) from None
    for line, row in _csv_rows(path, text) if suffix == ".csv" else _json_rows(path, text):
        nested = row.get("explanations")
        if not isinstance(nested, list):
            yield line, row
            continue
        shared = {k: row[k] for k in ("modelId", "layer", "index", "sae_id") if k in row}
        for explanation in nested:
            if not isinstance(explanation, dict):
                raise DataError(f"{path}, line {line}: an explanation is not an object; nothing was imported")
            yield line, explanation | shared


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if not {"index", "description"} <= set(names):
            raise DataError(
                f"{path}, line 1: a label file has the columns index and description, this one {names}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: the row has more or fewer cells than the header"
                )
            values = {k: v for k, v in row.items() if v != ""}
            if "sae_id" in names:  # one of our own files: its text cells were guarded
                values |= {c: unguard(values[c]) for c in _TEXT_COLUMNS if c in values}
            yield reader.line_num, values
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({e}); nothing was imported") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON array, or of values one after the other (JSON lines), each with the line it begins on."""
    decoder, at, line = json.JSONDecoder(parse_constant=_no_constant), 0, 1
    in_list = text.lstrip().startswith("[")
    skip = " \t\r\n" + ("[]," if in_list else "")
    while True:
        while at < len(text) and text[at] in skip:
            line += text[at] == "\n"
            at += 1
        if at >= len(text):
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}, line {line}: not JSON ({e}); nothing was imported") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {line}: not an object; nothing was imported")
        yield line, value
        line += text.count("\n", at, end)
        at = end


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _event(row: dict[str, Any], target: Target, source: tuple[str, str]) -> dict[str, Any]:
    _check_source(row, target, source)
    index, description = row.get("index"), row.get("description")
    if (
        isinstance(index, bool)
        or not str(index).isascii()
        or not str(index).isdigit()
        or len(str(index)) > 12
    ):
        raise DataError(f"index {_short(index)} is not a feature number")
    if int(str(index)) >= target.d_sae:
        raise DataError(f"index {index} is not a feature of this SAE, which has 0 to {target.d_sae - 1}")
    if not isinstance(description, str) or not description.strip():
        raise DataError("the row has no description")
    sign = _number(row.get("sign", 1), "sign")
    if sign not in ((1, -1) if target.signed else (1,)):
        raise DataError(f"sign {_short(row.get('sign'))} is not a pole of this SAE")
    kind, model = str(row.get("typeName") or "import"), str(row.get("explanationModelName") or "")
    return make_event(
        sae_id=target.sae_id, feature=int(str(index)), text=description, sign=int(sign or 1),
        author=str(row.get("author") or "neuronpedia"), score=_score(row),
        method=str(row.get("method") or (f"{kind}@{model}" if model else kind)),
    )  # fmt: skip


def _check_source(row: dict[str, Any], target: Target, source: tuple[str, str]) -> None:
    if row.get("sae_id"):
        if row["sae_id"] != target.sae_id:
            raise DataError(f"the row is of SAE {_short(row['sae_id'])}, not of {target.sae_id}")
        return
    found = (str(row.get("modelId", "")), str(row.get("layer", "")))
    if found != source:
        raise DataError(
            f"the row is of {_short('/'.join(found))}, not of {'/'.join(source)}: where both name the same SAE, "
            "give --source MODEL_ID/LAYER as the file has it"
        )


def _score(row: dict[str, Any]) -> float | None:
    scores: Sequence[Any] = row["scores"] if isinstance(row.get("scores"), list) else []
    value = row.get("score", scores[0].get("value") if scores and isinstance(scores[0], dict) else None)
    return None if value is None else _number(value, "score")


def _number(value: Any, name: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not math.isfinite(number):
        raise DataError(f"{name} {_short(value)} is not a number")
    return number


def _short(value: Any) -> str:
    return repr(value)[:60]
