"""Questions to a feature index, answered in SQL: the same functions for app, command line and notebooks. No torch.

    index = FeatureIndex.open("workspace")            # or a features/<sae_id>@<store> folder
    frame, total = index.list_features("calendar", mode="token")
    index.examples(4458, kind="top")

The database is attached read-only to an in-memory DuckDB that can read nothing outside its workspace, values are
bound parameters, and sort columns come from a list. Each call takes its own cursor, so threads may share an index.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cache.corpus import Corpus
from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import read_json, workspace_path
from saes.example import Example
from saes.index_file import connect_index
from saes.labels import current_labels

SORTS = {"density", "max_act", "min_act", "mean_act", "n_fire", "feature", "match", "proxy_score"}
PROXIES_RECORD = "proxies.json"
MODES = ("label", "token", "id")
MAX_PAGE = 200
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,80}")


class FeatureIndex:
    """A finished index: `meta` says what it was made from, the methods ask it."""

    def __init__(self, folder: Path, workspace: Path) -> None:
        self.folder, self.workspace = folder, workspace
        self.meta: dict[str, Any] = read_json(folder / "current.json")
        if self.meta.get("schema_version") != 1:
            raise DataError(
                f"{folder} has schema version {self.meta.get('schema_version')}, this program reads 1"
            )
        self.sae_id: str = self.meta["sae_id"]
        self.corpus = Corpus.open(workspace / "corpora" / self.meta["corpus"])
        self._base = connect_index(folder / self.meta["file"], workspace)

    @classmethod
    def open(cls, path: str | Path | None = None, sae_id: str | None = None) -> FeatureIndex:
        """Open an index folder, or in a workspace the index of `sae_id` (default: the newest).

        Raises MissingDataError where there is none, and UsageError for an id that cannot be one.
        """
        folder = Path(path) if path is not None else None
        if folder is not None and (folder / "current.json").is_file():
            return cls(folder, folder.resolve().parents[1])
        workspace = workspace_path(path, create=False)
        if sae_id is not None and not _NAME.fullmatch(sae_id):
            raise UsageError(f"{sae_id[:80]!r} is not an SAE id: ids are 16 hexadecimal digits")
        found = [m for m in cls.find_all(workspace) if sae_id in (None, m["sae_id"], Path(m["folder"]).name)]
        if not found:
            what = f"index of SAE {sae_id}" if sae_id else "feature index"
            raise MissingDataError(
                f"no {what} in {workspace}: run `atomscope index SAE STORE`, or `atomscope demo`"
            )
        return cls(Path(found[-1]["folder"]), workspace)

    @staticmethod
    def find_all(workspace: str | Path | None = None) -> list[dict[str, Any]]:
        """`meta` of every finished index of a workspace, oldest first, with its `folder`."""
        root = workspace_path(workspace, create=False)
        metas = [read_json(p) | {"folder": str(p.parent)} for p in root.glob("features/*/current.json")]
        return sorted(metas, key=lambda m: m["provenance"]["created"])

    def frame(self, sql: str, parameters: Sequence[Any] = ()) -> pd.DataFrame:
        """Result of a statement with bound parameters, as a data frame."""
        cursor = self._base.cursor()
        try:
            return cursor.execute(sql, list(parameters)).df()
        finally:
            cursor.close()

    # ---- lists ----

    def list_features(
        self,
        query: str = "",
        *,
        mode: str = "label",
        density: tuple[float, float] | None = None,
        alive: bool = True,
        min_max_act: float | None = None,
        within: Sequence[int] | None = None,
        sort: str | None = None,
        descending: bool = True,
        limit: int = 50,
        offset: int = 0,
    ) -> tuple[pd.DataFrame, int]:
        """A page of features and the number that match.

        mode: `label` (text in a label), `token` (features that fire on a token, sorted by `match`, the activation mass
        there), `id`. density: range of the share of tokens. within: only these features. Columns: feature, label,
        density, max_act, min_act, n_fire, top_token, match, and proxy_score (of the better pole) where sorted by it.
        """
        sort = sort or ("match" if mode == "token" and query.strip() else "density")
        if mode not in MODES or sort not in SORTS:
            raise UsageError(f"mode is one of {', '.join(MODES)} and sort one of {', '.join(sorted(SORTS))}")
        labels = self.labels()
        where, parameters = ["true"], []
        match_sql = "NULL::DOUBLE"
        if query.strip():
            condition, values, match_sql = self._match(query, mode, labels)
            where.append(condition)
            parameters += values
        if alive:
            where.append("f.n_fire > 0")
        if density is not None:
            where.append("f.density BETWEEN ? AND ?")
            parameters += list(density)
        if within is not None:
            where.append("f.feature IN (SELECT unnest(?::INTEGER[]))")
            parameters.append([int(f) for f in within])
        if min_max_act is not None:
            where.append("greatest(f.max_act, -f.min_act) >= ?")
            parameters.append(min_max_act)
        scored = sort == "proxy_score"
        proxies = f" LEFT JOIN ({self._best_pole_sql()}) p USING (feature)" if scored else ""
        body = f"FROM idx.feature f{proxies} WHERE {' AND '.join(where)}"
        total = int(self.frame(f"SELECT count(*) AS n {body}", parameters)["n"][0])
        order = sort if sort != "match" or match_sql != "NULL::DOUBLE" else "density"
        page = self.frame(
            f"SELECT f.feature, f.density, f.max_act, f.min_act, f.n_fire, f.top_tok, f.hist, {match_sql} AS match"
            f"{', proxy_score' if scored else ''} {body} "
            f"ORDER BY {order} {'DESC' if descending else 'ASC'} NULLS LAST, f.feature LIMIT ? OFFSET ?",
            [*parameters, min(max(limit, 0), MAX_PAGE), max(offset, 0)],
        )
        page.insert(1, "label", [_label_text(labels, int(f)) for f in page["feature"]])
        page.insert(6, "top_token", [self.token(t) for t in page.pop("top_tok")])
        return page, total

    def _match(self, query: str, mode: str, labels: dict[tuple[int, int], Any]) -> tuple[str, list[Any], str]:
        if mode == "id":
            if not query.strip().isdigit() or len(query.strip()) > 9:
                return "false", [], "NULL::DOUBLE"
            return "f.feature = ?", [int(query)], "NULL::DOUBLE"
        if mode == "label":
            text = query.strip().casefold()
            ids = [f for (f, _), e in labels.items() if text in e["text"].casefold()]
            return "f.feature IN (SELECT unnest(?::INTEGER[]))", [ids], "NULL::DOUBLE"
        ids = self.tokens_like(query)["tok"].tolist()
        # ids come from the vocabulary and are integers; they appear twice, so they are written, not bound
        tokens = f"[{', '.join(str(int(t)) for t in ids)}]::INTEGER[]"
        on = f"FROM idx.token_feature t WHERE t.feature = f.feature AND t.tok IN (SELECT unnest({tokens}))"
        return (
            f"f.feature IN (SELECT feature FROM idx.token_feature WHERE tok IN (SELECT unnest({tokens})))",
            [],
            f"(SELECT sum(t.mass) {on})",
        )

    def tokens_like(self, text: str, limit: int = 50) -> pd.DataFrame:
        """Vocabulary entries that read as `text` but for case and surrounding space; else those that begin with it."""
        want = text.strip().casefold()
        vocab = self.corpus.vocab
        exact = [i for i, t in enumerate(vocab) if t.strip().casefold() == want] if want else []
        if not exact and want:
            exact = [i for i, t in enumerate(vocab) if t.strip().casefold().startswith(want)]
        ids = exact[:limit]
        return pd.DataFrame({"tok": pd.Series(ids, dtype="int64"), "token": [vocab[i] for i in ids]})

    def random_feature(self, seed: int | None = None) -> int:
        """A feature that fires."""
        alive = self.frame("SELECT feature FROM idx.feature WHERE n_fire > 0 ORDER BY feature")[
            "feature"
        ].to_numpy()
        return int(np.random.default_rng(seed).choice(alive))

    # ---- one feature ----

    def feature(self, feature: int) -> dict[str, Any]:
        """Everything stored of a feature: counts, density, extremes, decoder norm, map position, label events."""
        self._check(feature)
        row: dict[str, Any] = (
            self.frame("SELECT * FROM idx.feature WHERE feature = ?", [feature]).iloc[0].to_dict()
        )
        labels = self.labels()
        row["top_token"] = self.token(row["top_tok"])
        row["labels"] = {s: labels[(feature, s)] for s in (1, -1) if (feature, s) in labels}
        row["label"] = _label_text(labels, feature)
        return row

    def _check(self, feature: int) -> None:
        if not 0 <= int(feature) < self.meta["d_sae"]:
            raise MissingDataError(
                f"no feature {feature}: this SAE has features 0 to {self.meta['d_sae'] - 1}"
            )

    def examples(
        self,
        feature: int,
        *,
        kind: str = "top",
        sign: int = 1,
        n: int = 20,
        width: int = 30,
        split: str | None = None,
    ) -> list[Example]:
        """Contexts of a feature: `top` (of one sign), `quantile` (five of each tenth of its firings) or `random`.

        width: tokens shown, at most, around the firing, never past its own forward context. split: `train` or
        `heldout` documents only. Identical windows appear once, with their number in `repeats`.
        """
        self._check(feature)
        where, parameters = ["feature = ?"], [feature]
        if kind == "top":
            where += ["kind = 'top'", "sign = ?"]
            parameters.append(sign)
        elif kind == "quantile":
            where.append("kind LIKE 'q%'")
        elif kind == "random":
            where.append("kind = 'random'")
        else:
            raise UsageError(f"kind is top, quantile or random, not {kind!r}")
        sql = f"SELECT row, value, kind FROM idx.feature_example WHERE {' AND '.join(where)} ORDER BY kind, rank"
        found = self.frame(sql, parameters)
        splits = self.corpus.column("split")
        if split is not None:
            found = found[splits[found["row"].to_numpy()] == (1 if split == "heldout" else 0)]
        return self._windows(feature, found, n if kind != "quantile" else max(n, 50), width)

    def firings(self, feature: int, sign: int = 1) -> pd.DataFrame:
        """Every firing of one pole, the strongest first: row, value."""
        self._check(feature)
        sql = "SELECT row, value FROM idx.activation WHERE feature = ? AND value * ? > 0 ORDER BY abs(value) DESC, row"
        return self.frame(sql, [feature, sign])

    def contexts(
        self,
        feature: int,
        rows: Sequence[int] | np.ndarray,
        values: Sequence[float] | np.ndarray,
        *,
        width: int = 30,
    ) -> list[Example]:
        """Windows around given rows, in their order, with the feature's activations; identical windows once."""
        found = pd.DataFrame({"row": np.asarray(rows), "value": np.asarray(values), "kind": "top"})
        return self._windows(feature, found, len(found), width)

    def _windows(self, feature: int, found: pd.DataFrame, n: int, width: int) -> list[Example]:
        spans = [self._span(int(row), width) for row in found["row"]]
        rows = sorted({r for span in spans for r in span})
        acts = self._activations(feature, rows)
        tok, vocab = self.corpus.column("tok"), self.corpus.vocab
        names = ("doc", "seq", "pos", "split")
        columns = {name: self.corpus.column(name) for name in names}
        out: dict[tuple[Any, ...], Example] = {}
        for span, row, value, kind in zip(spans, found["row"], found["value"], found["kind"], strict=True):
            row = int(row)
            ids = tok[span.start : span.stop]
            key = (kind if kind != "top" else "", row - span.start, ids.tobytes())
            old = out.get(key)
            if old is not None:
                out[key] = Example(**{**old.__dict__, "repeats": old.repeats + 1})
                continue
            if len(out) >= n:
                continue
            doc, seq, pos, split = (int(columns[name][row]) for name in names)
            out[key] = Example(
                row=row, doc=doc, seq=seq, pos=pos, split="heldout" if split else "train", value=float(value),
                tokens=[vocab[t] for t in ids], values=[acts.get(r, 0.0) for r in span], centre=row - span.start,
                band=kind if kind.startswith("q") else "", rows=span,
            )  # fmt: skip
        return list(out.values())

    def _span(self, row: int, width: int) -> range:
        """Rows around `row` inside its own forward context: two thirds before it, one third after."""
        offsets = self.corpus.seq_offsets
        seq = int(self.corpus.column("seq")[row])
        before = max(0, width - 1) * 2 // 3
        start = max(int(offsets[seq]), row - before)
        return range(start, min(int(offsets[seq + 1]), start + max(1, width), row + width))

    def _activations(self, feature: int, rows: list[int]) -> dict[int, float]:
        sql = (
            "SELECT row, value FROM idx.activation WHERE feature = ? AND row IN (SELECT unnest(?::BIGINT[]))"
        )
        found = self.frame(sql, [feature, rows])
        return dict(zip(found["row"].tolist(), found["value"].tolist(), strict=True))

    def histogram(self, feature: int) -> pd.DataFrame:
        """Counts of the non-zero activations in 32 equal bins from its smallest (or 0) to its largest: lo, hi, count."""
        f = self.feature(feature)
        counts = np.asarray(f["hist"])
        edges = np.linspace(f["min_act"], f["max_act"], len(counts) + 1)
        return pd.DataFrame({"lo": edges[:-1], "hi": edges[1:], "count": counts})

    def logits(self, feature: int) -> pd.DataFrame:
        """Tokens raised (`top`) and lowered (`bottom`) most by the direct path: side, rank, token, value (centred)."""
        f = self.feature(feature)
        rows = []
        for side in ("top", "bottom"):
            tokens, values = f[f"logit_{side}_tok"], f[f"logit_{side}"]
            if tokens is None or np.ndim(tokens) == 0:
                continue
            for rank, (t, v) in enumerate(zip(tokens, values, strict=True)):
                rows.append({"side": side, "rank": rank, "token": self.token(t), "value": float(v)})
        return pd.DataFrame(rows, columns=["side", "rank", "token", "value"])

    def neighbours(self, feature: int) -> pd.DataFrame:
        """Features with the nearest or most opposite decoder rows: feature, other, cos, label, density, top_token."""
        self._check(feature)
        frame = self.frame(
            "SELECT n.feature, n.other, n.cos, f.density, f.top_tok FROM idx.neighbour n JOIN idx.feature f "
            "ON f.feature = n.other WHERE n.feature = ? ORDER BY abs(n.cos) DESC",
            [feature],
        )
        labels = self.labels()
        frame.insert(3, "label", [_label_text(labels, int(o)) for o in frame["other"]])
        frame["top_token"] = [self.token(t) for t in frame.pop("top_tok")]
        return frame

    def token_features(self, tok: int, limit: int = 50) -> pd.DataFrame:
        """Features that fire on a token id, by activation mass: feature, n, max_act, min_act, mass."""
        return self.frame(
            "SELECT feature, n, max_act, min_act, mass FROM idx.token_feature WHERE tok = ? ORDER BY mass DESC LIMIT ?",
            [int(tok), limit],
        )

    def map(self) -> pd.DataFrame:
        """Position of each living feature on the 2-D map (principal components of the decoder): feature, x, y, density."""
        return self.frame(
            "SELECT feature, x, y, density, max_act FROM idx.feature WHERE n_fire > 0 ORDER BY feature"
        )

    def proxies(self) -> pd.DataFrame:
        """Interpretability proxies, one row a pole that fires (columns: saes/proxies.py)."""
        return self.frame(f"SELECT * FROM {self.proxies_sql()} ORDER BY feature, sign DESC")

    def proxies_sql(self) -> str:
        """The table of proxies as SQL. Raises MissingDataError where this index file has none."""
        path = self.folder / PROXIES_RECORD
        record = read_json(path) if path.is_file() else {}
        if record.get("index") != self.meta["file"]:
            raise MissingDataError(
                "this index has no interpretability proxies yet: run `atomscope feature proxies`"
            )
        return (
            f"read_parquet('{str((self.folder / record['file']).resolve()).replace(chr(39), chr(39) * 2)}')"
        )

    def _best_pole_sql(self) -> str:
        # NaN stands for too few firings to judge: it sorts last, not first
        best = "max(proxy_score) FILTER (NOT isnan(proxy_score)) AS proxy_score"
        return f"SELECT feature, {best} FROM {self.proxies_sql()} GROUP BY feature"

    # ---- words ----

    def token(self, tok: Any) -> str:
        """Text of a token id; empty for a missing one."""
        vocab = self.corpus.vocab
        return "" if pd.isna(tok) or not 0 <= int(tok) < len(vocab) else vocab[int(tok)]

    def labels(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Labels in force, by (feature, sign)."""
        return {(f, s): e for (_, f, s), e in current_labels(self.workspace, self.sae_id).items()}

    def close(self) -> None:
        self._base.close()


def find_sae(workspace: Path, meta: dict[str, Any]) -> Path:
    """Folder of the SAE that an index was made from, by its id, inside the workspace; moved folders are found."""
    named = [workspace / meta["sae_path"]] if meta.get("sae_path") else []
    for folder in [*named, *(p.parent for p in sorted(workspace.glob("saes/*/*/cfg.json")))]:
        cfg = folder / "cfg.json"
        if not cfg.is_file() or not folder.resolve().is_relative_to(workspace.resolve()):
            continue
        if read_json(cfg).get("metadata", {}).get("sae_id") == meta["sae_id"]:
            return folder
    raise MissingDataError(
        f"the SAE {meta['sae_id']} is not in {workspace}: save it into saes/<run>/<name>, or train and index it again"
    )


def _label_text(labels: dict[tuple[int, int], dict[str, Any]], feature: int) -> str:
    both = [labels[(feature, s)]["text"] for s in (1, -1) if (feature, s) in labels]
    return " / ".join(both)
