"""Which features fire on a token or in a document, added up over the rows: by table for frequent tokens, else from codes.

Columns: feature, n, max_act, min_act, mass (sum of |value|), by falling mass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cache.corpus import Corpus
from cache.errors import MissingDataError
from saes.code_reader import FeatureSums, sum_features

if TYPE_CHECKING:
    from saes.queries import FeatureIndex

_SUMS = "feature, n, max_act, min_act, mass"


def sums_frame(sums: FeatureSums) -> pd.DataFrame:
    return pd.DataFrame(sums._asdict())


def features_of_token(index: FeatureIndex, tok: int, limit: int) -> pd.DataFrame:
    """The `limit` strongest features on one token."""
    sql = f"SELECT {_SUMS} FROM idx.token_feature WHERE tok = ? ORDER BY mass DESC, feature LIMIT ?"
    found = index.arrays(sql, [int(tok), limit])
    return pd.DataFrame(found) if len(found["feature"]) else _rare(index, [int(tok)]).head(limit)


def features_of_tokens(index: FeatureIndex, toks: list[int]) -> pd.DataFrame:
    """Features on any of several tokens, counted together."""
    sql = f"SELECT {_SUMS} FROM idx.token_feature WHERE tok IN (SELECT unnest(?::INTEGER[]))"
    both = pd.concat([index.frame(sql, [toks]), _rare(index, toks)], ignore_index=True)
    how = {"n": "sum", "max_act": "max", "min_act": "min", "mass": "sum"}
    return both.groupby("feature", as_index=False).agg(how).sort_values("mass", ascending=False)


def _rare(index: FeatureIndex, toks: list[int]) -> pd.DataFrame:
    """Features on those of the tokens that are in no table, from the codes of their rows."""
    rows = np.empty(0, np.int64)
    if index.meta.get("frequent"):  # an index of the first version has every token in its table
        sql = "SELECT row FROM idx.rare_token WHERE tok IN (SELECT unnest(?::INTEGER[])) ORDER BY row"
        rows = index.arrays(sql, [toks])["row"]
    return sums_frame(sum_features(index.codes.codes(rows)))


class DocumentRows:
    """Rows of each document of a corpus; most corpora have them in order, packed ones need not."""

    def __init__(self, corpus: Corpus) -> None:
        doc = corpus.column("doc")
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(doc, minlength=corpus.n_docs))])
        self._order = None if (doc[1:] >= doc[:-1]).all() else np.argsort(doc, kind="stable")

    def rows(self, doc: int) -> np.ndarray:
        """Rising row ids. Raises MissingDataError for a document that is not there."""
        if not 0 <= doc < len(self._ends) - 1:
            raise MissingDataError(f"no document {doc}: this corpus has documents 0 to {len(self._ends) - 2}")
        at = np.arange(self._ends[doc], self._ends[doc + 1])
        return at if self._order is None else self._order[at]
