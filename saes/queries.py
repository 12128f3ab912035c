"""Questions to a feature index, answered in SQL: the same functions for app, command line and notebooks. No torch.

    index = FeatureIndex.open("workspace")            # or a features/<sae_id>@<store> folder
    frame, total = index.list_features("calendar", mode="token")
    index.examples(4458, kind="top")

The database is attached read-only to an in-memory DuckDB that can read nothing outside its workspace, values are
bound parameters, and sort columns come from a list. Each call takes its own cursor, so threads may share an index.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cache.corpus import Corpus
from cache.errors import DataError, MissingDataError, UsageError
from cache.workspace import read_json, workspace_path
from saes.code_files import record_file
from saes.code_reader import CodeReader, sum_features
from saes.example import Example
from saes.index_file import connect_index
from saes.labels import current_labels
from saes.token_queries import DocumentRows, features_of_token, features_of_tokens, sums_frame
from saes.windows import windows

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

    def arrays(self, sql: str, parameters: Sequence[Any] = ()) -> dict[str, np.ndarray]:
        """The same as numpy arrays, without the millisecond that a data frame takes."""
        cursor = self._base.cursor()
        try:
            return cursor.execute(sql, list(parameters)).fetchnumpy()
        finally:
            cursor.close()

    @functools.cached_property
    def codes(self) -> CodeReader:
        """The codes of any rows, token-major."""
        folder = self.folder / "codes"
        known = self.meta.get("shards")
        if known is None:  # an index of the first version covers all shards
            ids = itertools.takewhile(lambda i: record_file(folder, i).is_file(), itertools.count())
            known = [(i, read_json(record_file(folder, i))["row0"]) for i in ids]
        return CodeReader(folder, *zip(*known, strict=True))

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
        where, body = ["true"], "FROM idx.feature f"
        parameters: list[Any] = []
        match_sql = "NULL::DOUBLE"
        if query.strip():
            parameters += self._match(query, mode, labels)
            body += " JOIN (SELECT unnest(?::INTEGER[]) AS feature, unnest(?::DOUBLE[]) AS match) m USING (feature)"
            match_sql = "m.match"
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
        body += f" LEFT JOIN ({self._best_pole_sql()}) p USING (feature)" if scored else ""
        body += f" WHERE {' AND '.join(where)}"
        total = int(self.frame(f"SELECT count(*) AS n {body}", parameters)["n"][0])
        order = sort if sort != "match" or (query.strip() and mode == "token") else "density"
        page = self.frame(
            f"SELECT f.feature, f.density, f.max_act, f.min_act, f.n_fire, f.top_tok, f.hist, {match_sql} AS match"
            f"{', proxy_score' if scored else ''} {body} "
            f"ORDER BY {order} {'DESC' if descending else 'ASC'} NULLS LAST, f.feature LIMIT ? OFFSET ?",
            [*parameters, min(max(limit, 0), MAX_PAGE), max(offset, 0)],
        )
        page.insert(1, "label", [_label_text(labels, int(f)) for f in page["feature"]])
        page.insert(6, "top_token", [self.token(t) for t in page.pop("top_tok")])
        return page, total

    def _match(self, query: str, mode: str, labels: dict[tuple[int, int], Any]) -> list[list[Any]]:
        """Features that answer the query, and the activation mass of each on the tokens asked for (else None)."""
        text = query.strip()
        if mode == "token":
            hits = features_of_tokens(self, self.tokens_like(text)["tok"].tolist())
            return [hits["feature"].tolist(), hits["mass"].tolist()]
        if mode == "id":
            ids = [int(text)] if text.isascii() and text.isdigit() and len(text) <= 9 else []
        else:
            ids = sorted({f for (f, _), e in labels.items() if text.casefold() in e["text"].casefold()})
        return [ids, [None] * len(ids)]

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
        # the rows of one feature are few and lie together: chosen here, the query takes half the time
        found = self.arrays(
            "SELECT sign, kind, rank, row, value FROM idx.feature_example WHERE feature = ?", [feature]
        )
        kinds = found["kind"].astype(str)
        if kind == "quantile":
            keep = np.char.startswith(kinds, "q")
        elif kind in ("top", "random"):
            keep = (kinds == kind) & ((found["sign"] == sign) | (kind == "random"))
        else:
            raise UsageError(f"kind is top, quantile or random, not {kind!r}")
        if split is not None:
            keep &= self.corpus.column("split")[found["row"]] == (1 if split == "heldout" else 0)
        at = np.flatnonzero(keep)
        at = at[np.lexsort((found["rank"][at], kinds[at]))]
        return windows(
            self.corpus, self.codes, feature, rows=found["row"][at], values=found["value"][at],
            kinds=kinds[at].tolist(), n=n if kind != "quantile" else max(n, 50), width=width,
        )  # fmt: skip

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
        at = np.asarray(rows, dtype=np.int64)
        return windows(
            self.corpus, self.codes, feature, rows=at, values=np.asarray(values), kinds=["top"] * len(at),
            n=len(at), width=width,
        )  # fmt: skip

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
        return features_of_token(self, tok, limit)

    def document_features(self, doc: int, limit: int = 50) -> pd.DataFrame:
        """Features that fire in a document, by activation mass: feature, n, max_act, min_act, mass."""
        rows = self._documents.rows(doc)
        return sums_frame(sum_features(self.codes.codes(rows))).head(limit)

    @functools.cached_property
    def _documents(self) -> DocumentRows:
        return DocumentRows(self.corpus)

    def densities(self) -> np.ndarray:
        """Share of rows on which each feature fires, float64 `[d_sae]`."""
        found = self.arrays("SELECT feature, density FROM idx.feature")
        out = np.zeros(self.meta["d_sae"])
        out[found["feature"]] = found["density"]
        return out

    def density_histogram(self, bins: int = 40) -> pd.DataFrame:
        """Counts of log10 density over the features that fire: lo, hi, count."""
        density = self.densities()
        low = np.floor(np.log10(1 / max(self.meta["n_tokens"], 10)))
        counts, edges = np.histogram(np.log10(density[density > 0]), bins=bins, range=(low, 0.0))
        return pd.DataFrame({"lo": edges[:-1], "hi": edges[1:], "count": counts})

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
