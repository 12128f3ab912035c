"""Labels: nothing is lost between writers, files go round, and rows of another SAE are refused by line."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import connect
from cache.errors import DataError, MissingDataError, UsageError
from saes.label_files import Target, export_labels, guard, import_labels, unguard
from saes.labels import add_label, all_events, clean, current_labels, label_events

ROOT = Path(__file__).resolve().parent.parent
TARGET = Target(sae_id="5" * 16, model="tiny", hook="blocks.1.hook_resid_post", d_sae=50, signed=True)
SUFFIXES = [".json", ".jsonl", ".jsonl.gz", ".csv"]
WRITER = """
import sys
from pathlib import Path
from saes.labels import add_label
root, who, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for i in range(n):
    add_label(root, sae_id="s", feature=i, text=f"{who} {i} " + "x" * (i % 400), author="both")
"""


def give(root: Path, feature: int = 3, text: str = "rain", **other: object) -> None:
    add_label(root, **{"sae_id": TARGET.sae_id, "feature": feature, "text": text, "author": "ada"} | other)


def in_force(root: Path) -> dict:
    fields = ("text", "author", "method", "score")
    return {k: tuple(e[f] for f in fields) for k, e in current_labels(root, TARGET.sae_id).items()}


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    n = 150
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen(
            [*command, who, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for who in ("app", "notebook")
    ]
    for w in writers:
        assert w.stdout is not None and w.stdout.readline() == "ready\n"
    for w in writers:
        assert w.stdin is not None
        w.stdin.write("go\n")
        w.stdin.flush()
    while any(w.poll() is None for w in writers):
        label_events(tmp_path)  # a reader in between never sees a damaged file
    assert [w.wait() for w in writers] == [0, 0]
    for w in writers:
        w.stdout.close()
        w.stdin.close()
    events = label_events(tmp_path)
    assert len(events) == 2 * n
    for who in ("app", "notebook"):
        mine = [e for e in events if e["text"].startswith(who + " ")]
        assert [e["feature"] for e in mine] == list(range(n)), "in the order in which they were written"


def test_a_label_after_a_killed_writer_is_not_swallowed_by_its_half_line(tmp_path: Path) -> None:
    give(tmp_path, text="first")
    with (tmp_path / "annotations" / "ada.jsonl").open("a") as f:
        f.write('{"kind": "label", "sae_id": "5555", "fea')
    give(tmp_path, text="second")
    assert [e["text"] for e in label_events(tmp_path)] == ["first", "second"]
    with (tmp_path / "annotations" / "ada.jsonl").open("a") as f:
        f.write("not json}\n")
    give(tmp_path, text="third")
    with pytest.raises(DataError, match="line 4 is not a label event"):
        label_events(tmp_path)


def test_events_of_an_older_version_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    old = {
        "sae_id": "s",
        "feature": 1,
        "sign": 1,
        "text": "old",
        "author": "a",
        "method": "hand",
        "score": None,
    }
    (tmp_path / "annotations" / "a.jsonl").write_text(json.dumps(old | {"created": "2025-01-01"}) + "\n")
    assert current_labels(tmp_path)[("s", 1, 1)]["text"] == "old"


def test_notes_stay_beside_the_label(tmp_path: Path) -> None:
    give(tmp_path, text="rain")
    give(tmp_path, text="fires on drizzle too", kind="note")
    give(tmp_path, text="and on hail", kind="note")
    assert in_force(tmp_path)[(TARGET.sae_id, 3, 1)][0] == "rain"
    assert [e["text"] for e in all_events(tmp_path, ("note",))] == ["fires on drizzle too", "and on hail"]


@pytest.mark.parametrize(
    "bad",
    [
        {"sign": 0},
        {"feature": -1},
        {"text": "x" * 501},
        {"score": float("nan")},
        {"kind": "tag"},
        {"author": "a" * 101},
    ],
)
def test_a_bad_event_is_refused_and_nothing_is_written(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(UsageError):
        give(tmp_path, **bad)
    assert not list(tmp_path.glob("annotations/*.jsonl"))


def test_control_characters_reach_neither_files_nor_sql(tmp_path: Path) -> None:
    give(tmp_path, text="a\x00b\nc\ud800 d'; DROP TABLE x; --", author="\x07eve\n")
    shown = connect(tmp_path).sql("SELECT text, author FROM labels").fetchall()
    assert shown == [("ab c d'; DROP TABLE x; --", "eve")]


texts = st.one_of(
    st.text(min_size=1, max_size=60),
    st.sampled_from(
        ["=1+1", "+x", "-2", "@a", "'", "''=x", "'tis", '",\n"', "[1,2]", "﻿bom", "\u2028", "x" * 500]
    ),
).filter(lambda t: 0 < len(clean(t)) <= 500)
names = st.one_of(st.just("hand"), st.text(min_size=1, max_size=20)).filter(lambda t: clean(t) != "")
scores = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))
labels = st.dictionaries(
    st.tuples(st.integers(0, TARGET.d_sae - 1), st.sampled_from([1, -1])), st.tuples(texts, names, names, scores), max_size=6
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels, st.sampled_from(SUFFIXES), st.booleans())
def test_labels_go_to_a_file_and_back(
    tmp_path_factory, given_labels: dict, suffix: str, nested: bool
) -> None:
    root = tmp_path_factory.mktemp("round")
    a, b, file = root / "a", root / "b", root / f"labels{suffix}"
    for (feature, sign), (text, author, method, score) in given_labels.items():
        give(a, feature, text, sign=sign, author=author, method=method, score=score)
    form = "features" if nested and suffix != ".csv" else "explanations"
    a.mkdir(exist_ok=True)
    assert export_labels(a, TARGET, file, form=form) == len(given_labels)
    assert import_labels(b, TARGET, file).added == len(given_labels)
    assert in_force(b) == in_force(a)
    assert import_labels(b, TARGET, file) == (0, len(given_labels), 0), "a second import adds nothing"


def explanation(**other: object) -> dict:
    return {
        "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "7", "description": "time of day",
        "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini", "authorId": "x", "embedding": "[0.1]",
    } | other  # fmt: skip


SOURCE = ("gemma-2-2b", "20-gemmascope-res-16k")


def test_neuronpedia_s_own_files_are_read(tmp_path: Path) -> None:
    flat = tmp_path / "batch-0.jsonl.gz"
    rows = [explanation(), explanation(index=8, description=" dates ", scores=[{"value": 0.9}])]
    flat.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in rows).encode()))
    assert import_labels(tmp_path / "a", TARGET, flat, source=SOURCE).added == 2
    assert in_force(tmp_path / "a") == {
        (TARGET.sae_id, 7, 1): ("time of day", "neuronpedia", "oai_token-act-pair@gpt-4o-mini", None),
        (TARGET.sae_id, 8, 1): ("dates", "neuronpedia", "oai_token-act-pair@gpt-4o-mini", 0.9),
    }
    feature = tmp_path / "feature.json"
    inner = {
        "description": "measurements",
        "typeName": "np_max-act",
        "explanationModelName": "m",
        "scores": [],
    }
    whole = {
        "modelId": SOURCE[0],
        "layer": SOURCE[1],
        "index": "9",
        "maxActApprox": 22.7,
        "explanations": [inner],
    }
    feature.write_text(json.dumps(whole))
    assert import_labels(tmp_path / "a", TARGET, feature, source=SOURCE).added == 1
    assert in_force(tmp_path / "a")[(TARGET.sae_id, 9, 1)][0] == "measurements"


BAD_ROWS = [
    ({"layer": "21-gemmascope-res-16k"}, "--source"),
    ({"modelId": "gpt2-small"}, "--source"),
    ({"sae_id": "0" * 16}, "of SAE"),
    ({"index": "50"}, "0 to 49"),
    ({"index": "-1"}, "not a feature number"),
    ({"index": "٣"}, "not a feature number"),
    ({"index": True}, "not a feature number"),
    ({"index": None}, "not a feature number"),
    ({"description": " "}, "no description"),
    ({"description": 3}, "no description"),
    ({"description": "x" * 501}, "500 characters"),
    ({"sign": 0}, "pole"),
    ({"sign": "up"}, "not a number"),
    ({"score": "good"}, "not a number"),
    ({"scores": [{"value": True}]}, "not a number"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_a_foreign_row_is_refused_by_its_line_and_nothing_is_imported(
    tmp_path: Path, bad: dict, reason: str
) -> None:
    rows = [explanation(index=str(i)) for i in range(3)] + [explanation(**bad)]
    array, lines = tmp_path / "x.json", tmp_path / "x.jsonl"
    array.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]")
    lines.write_text("\n".join(json.dumps(r) for r in rows))
    for path, line in ((array, 5), (lines, 4)):
        with pytest.raises(DataError, match=f"line {line}: .*{reason}.*nothing was imported"):
            import_labels(tmp_path, TARGET, path, source=SOURCE)
    assert not list(tmp_path.glob("annotations/*"))


def test_files_that_are_no_label_files_are_one_line(tmp_path: Path) -> None:
    for name, data, error, reason in (
        ("a.txt", b"x", UsageError, "name ends in"),
        ("none.json", None, MissingDataError, "does not exist"),
        ("b.json", b'[{"index": 1},\n {"index": NaN}]', DataError, "line 2: not JSON"),
        ("c.json", b"[\n3]", DataError, "line 2: not an object"),
        ("d.jsonl.gz", b"not gzip", DataError, "cannot be read"),
        ("e.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], DataError, "cannot be read"),
        ("f.csv", b"feature,text\n1,x\n", DataError, "line 1: .*columns"),
        ("g.csv", b"index,description\n1\n", DataError, "line 2: .*cells"),
        ("h.csv", b'index,description\n1,"x\n', DataError, "not CSV"),
        ("i.json", b"\xff\xfe\x00", DataError, "UTF-8"),
        ("j.json", b"[" * 100_000 + b"1", DataError, "not"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(error, match=reason):
            import_labels(tmp_path, TARGET, tmp_path / name, source=SOURCE)


def test_a_csv_holds_no_cell_that_a_spreadsheet_runs(tmp_path: Path) -> None:
    hostile = ['=HYPERLINK("http://evil.test")', "+1", "-1", "@SUM(A1)", "'=1", "＝1", "plain"]
    for i, text in enumerate(hostile):
        give(tmp_path, i, text, author=text, method=text)
    export_labels(tmp_path, TARGET, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(hostile)
    for row, text in zip(rows, hostile):
        assert not any(
            row[c].startswith(tuple("=+-@＝")) for c in ("description", "author", "method", "typeName")
        )
        assert [unguard(row[c]) for c in ("description", "author", "method")] == [text] * 3
    assert guard("plain") == "plain"


def test_an_import_can_leave_other_labels_alone(tmp_path: Path) -> None:
    give(tmp_path / "a", 1, "from the file")
    give(tmp_path / "a", 2, "new")
    give(tmp_path / "b", 1, "mine")
    file = tmp_path / "x.json"
    export_labels(tmp_path / "a", TARGET, file)
    assert import_labels(tmp_path / "b", TARGET, file, keep_existing=True) == (1, 0, 1)
    assert in_force(tmp_path / "b")[(TARGET.sae_id, 1, 1)][0] == "mine"
    assert import_labels(tmp_path / "b", TARGET, file) == (1, 1, 0)
    assert in_force(tmp_path / "b")[(TARGET.sae_id, 1, 1)][0] == "from the file"


def test_the_pole_of_a_one_sided_sae_is_checked(tmp_path: Path) -> None:
    give(tmp_path / "a", 1, "minus", sign=-1)
    export_labels(tmp_path / "a", TARGET, tmp_path / "x.jsonl")
    one_sided = Target(**TARGET.__dict__ | {"signed": False})
    with pytest.raises(DataError, match=r"line 1: .*pole"):
        import_labels(tmp_path / "b", one_sided, tmp_path / "x.jsonl")
