"""What the pages share: workspace, feature indexes, the model behind one lock, and a few small widgets.

Importing this module does not import torch; the functions that need a model do. Model and SAE live in
Streamlit's resource cache, never in a session. Ids from the URL are only ever looked up, never joined to a path.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st

from app import theme
from app.figures import HTML
from app.markup import escape
from cache.errors import AtomscopeError, DataError, UsageError
from cache.workspace import ENV_HOME
from saes.queries import FeatureIndex

PROMPT_LIMIT = 2000


def workspace() -> Path:
    """The workspace that `atomscope app` named; it may not exist yet."""
    return Path(os.environ.get(ENV_HOME) or "workspace").expanduser().resolve()


def theme_name() -> str:
    """ "light" or "dark", as the browser shows it."""
    shown = getattr(st.context, "theme", None)
    return "dark" if getattr(shown, "type", None) == "dark" else "light"


# --- small widgets -------------------------------------------------------------------------------------------


def line(text: str, command: str = "") -> None:
    """One plain line that says what is missing or wrong, with the command that helps."""
    code = f" <code>{escape(command)}</code>" if command else ""
    st.html(HTML(f'<div class="as-line">{escape(text)}{code}</div>'))


def muted(text: str) -> None:
    st.html(HTML(f'<div class="as-muted">{escape(text)}</div>'))


def title(text: str, aside: str = "") -> None:
    """The title of a page or of the thing it shows."""
    extra = f" <span>{escape(aside)}</span>" if aside else ""
    st.html(HTML(f'<div class="as-title" role="heading" aria-level="1">{escape(text)}{extra}</div>'))


# --- what there is -------------------------------------------------------------------------------------------


def index_metas() -> list[dict[str, Any]]:
    """Meta of every feature index in the workspace."""
    root = workspace()
    return FeatureIndex.list(root) if root.is_dir() else []


def sae_name(meta: dict[str, Any]) -> str:
    """Short name of an SAE for selectors: architecture, size, k."""
    return f"{meta['activation'].replace('_', '-')} · {meta['d_sae']:,} · k {meta['k']}"


def sae_choice() -> None:
    """The SAE selector of the sidebar. An id in the URL that does not exist is remembered for the page to name."""
    metas = index_metas()
    ids = [str(m["sae_id"]) for m in metas]
    asked = st.query_params.get("sae")
    if asked is not None and asked not in ids:
        st.session_state["unknown_sae"] = asked
    if not metas:
        return
    names = {str(m["sae_id"]): sae_name(m) for m in metas}
    st.selectbox(
        "SAE",
        ids,
        format_func=lambda i: f"{names.get(i, i)}  ({i[:6]})",
        key="sae",
        bind="query-params",
        on_change=lambda: st.session_state.pop("unknown_sae", None),
    )
    chosen = next(m for m in metas if m["sae_id"] == st.session_state["sae"])
    muted(f"{chosen['hook']} of {chosen['model']}")


def current_index() -> FeatureIndex | None:
    """The index of the chosen SAE; None (with a line that says what to do) where there is none."""
    unknown = st.session_state.get("unknown_sae")
    if unknown is not None:
        line(f"No SAE with the id “{unknown[:80]}” has a feature index in this workspace.")
    metas = {str(m["sae_id"]): m for m in index_metas()}
    if not metas:
        line("No feature index yet. Make model, activations, SAEs and index in one go with", "atomscope demo")
        muted("or, for SAEs that are trained already, atomscope index. Workspace: " + str(workspace()))
        return None
    sae_id = st.session_state.get("sae")
    try:
        return open_index(sae_id if sae_id in metas else next(iter(metas)))
    except AtomscopeError as e:
        line(str(e))
        return None


def open_index(sae_id: str) -> FeatureIndex:
    """An open index; opened anew when a rebuild has replaced it."""
    stamps = [p.stat().st_mtime_ns for p in (workspace() / "features").glob("*/current.json")]
    return _open_index(str(workspace()), sae_id, max(stamps, default=0))


@st.cache_resource(max_entries=8, show_spinner=False)
def _open_index(root: str, sae_id: str, stamp: int) -> FeatureIndex:  # noqa: ARG001 (part of the cache key)
    return FeatureIndex.open(Path(root), sae_id)


def feature_id(text: str, d_sae: int) -> int:
    """The feature that a text names; UsageError with the range where it names none."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < d_sae):
        raise UsageError(f"“{text[:80]}” is not a feature of this SAE: ids go from 0 to {d_sae - 1:,}")
    return int(text)


# --- the model -----------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _lock() -> threading.Lock:
    return threading.Lock()


@contextmanager
def model_lock() -> Iterator[None]:
    """One forward pass at a time in this server. Raises at once where another window holds the model."""
    lock = _lock()
    if not lock.acquire(timeout=2):
        raise AtomscopeError("the model is busy in another window: wait until it has finished, then try again")
    try:
        yield
    finally:
        lock.release()


@st.cache_resource(max_entries=1, show_spinner=False)
def _models() -> dict[str, Any]:
    """Loaded models by name; a plain dictionary, so that pages can ask without loading."""
    return {}


def loaded(meta: dict[str, Any]) -> bool:
    return meta["model"] in _models()


def load(meta: dict[str, Any]) -> None:
    """Load the model an SAE was trained on. Refuses other weights than those."""
    from cache.models import load_model

    with model_lock():
        model = load_model(meta["model"], workspace=workspace())
        wanted, found = load_sae(meta).cfg.model_sha, model.identity["weights_sha256"]
        if wanted and wanted != found:
            raise DataError(
                f"the SAE was trained on weights {wanted[:12]}, but {meta['model']} now has {found[:12]}: "
                "harvest, train and index again with the present model"
            )
        _models().clear()
        _models()[meta["model"]] = model


def model_of(meta: dict[str, Any]) -> Any:
    return _models()[meta["model"]]


def load_sae(meta: dict[str, Any]) -> Any:
    """The SAE of an index."""
    return _load_sae(str(meta["sae_path"]))


@st.cache_resource(max_entries=2, show_spinner=False)
def _load_sae(path: str) -> Any:
    from saes.sae import SAE

    return SAE.load(path)


def model_button(meta: dict[str, Any]) -> bool:
    """True once the model is loaded; until then the one button that loads it."""
    if loaded(meta):
        return True
    muted(f"This page runs {meta['model']} on this machine. Nothing leaves it.")
    if st.button("Load the model", type="primary", key="load_model"):
        try:
            with st.spinner("Loading model and SAE"):
                load(meta)
        except AtomscopeError as e:
            line(str(e))
            return False
        st.rerun()
    return False


def style() -> None:
    st.html(HTML(theme.stylesheet(theme_name())))
