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
from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.workspace import ENV_HOME
from saes.queries import FeatureIndex, find_sae

PROMPT_LIMIT = 2000
LOCK_SECONDS = 2.0
POLES = {"positive": 1, "negative": -1}  # words, because a plus sign in a URL reads as a space


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
    """Meta of every feature index in the workspace, the newest first."""
    root = workspace()
    if not root.is_dir():
        return []
    try:
        return FeatureIndex.find_all(root)[::-1]
    except AtomscopeError as e:
        line(str(e))
        return []


def sae_name(meta: dict[str, Any]) -> str:
    """Short name of an SAE for selectors: architecture, size, and k where it has one."""
    name = f"{meta['activation'].replace('_', '-')} · {meta['d_sae']:,}"
    return f"{name} · k {meta['k']}" if meta["k"] else name


def sae_choice() -> None:
    """The SAE selector of the sidebar, its id in ?sae=. An id that does not exist is remembered for the page to name.

    Not bound by Streamlit itself: a bound selector would put the name shown into the URL, and names are not ids.
    """
    metas = {str(m["sae_id"]): m for m in index_metas()}
    asked = st.query_params.get("sae")
    if asked in metas:
        st.session_state["sae"] = asked
    elif asked is not None:
        st.session_state["unknown_sae"] = asked
    if not metas:
        return
    if st.session_state.get("sae") not in metas:
        st.session_state["sae"] = next(iter(metas))
    st.selectbox(
        "SAE", list(metas), format_func=lambda i: f"{sae_name(metas[i])}  ({i[:6]})" if i in metas else i,
        key="sae", on_change=_sae_changed,
    )  # fmt: skip
    chosen = st.session_state["sae"]
    if asked != chosen:
        st.query_params["sae"] = chosen
    muted(f"{metas[chosen]['hook']} of {metas[chosen]['model']}")


def _sae_changed() -> None:
    st.query_params["sae"] = st.session_state["sae"]
    st.session_state.pop("unknown_sae", None)


def current_index() -> FeatureIndex | None:
    """The index of the chosen SAE; None (with a line that says what to do) where there is none."""
    unknown = st.session_state.get("unknown_sae")
    if unknown is not None:
        line(f"No SAE with the id “{unknown[:80]}” has a feature index in this workspace.")
    metas = {str(m["sae_id"]): m for m in index_metas()}
    if not metas:
        line("No feature index in this workspace yet. Make everything in one go with", "atomscope demo")
        muted("For an SAE that is trained already: atomscope index SAE STORE. Workspace: " + str(workspace()))
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
    if not lock.acquire(timeout=LOCK_SECONDS):
        raise AtomscopeError(
            "the model is busy in another window: wait until it has finished, then try again"
        )
    try:
        yield
    finally:
        lock.release()


@st.cache_resource(max_entries=1, show_spinner=False)
def _models() -> dict[str, Any]:
    """Loaded models by the sha of their weights; a plain dictionary, so that pages can ask without loading."""
    return {}


def _model_key(meta: dict[str, Any]) -> str:
    """Folders of different models may share a name, weights do not."""
    return str(meta.get("model_sha") or meta["model"])


def loaded(meta: dict[str, Any]) -> bool:
    return _model_key(meta) in _models()


def load(meta: dict[str, Any], source: str) -> None:
    """Load the model an SAE was trained on from a name or folder. Refuses other weights than those."""
    from cache.models import load_model

    with model_lock():
        model = load_model(source, workspace=workspace())
        wanted, found = load_sae(meta).cfg.model_sha, model.identity["weights_sha256"]
        if wanted and wanted != found:
            raise DataError(
                f"the SAE was trained on weights {wanted[:12]}, {source} has {found[:12]}: name the model it was trained on"
            )
        _models().clear()
        _models()[_model_key(meta)] = model


def model_of(meta: dict[str, Any]) -> Any:
    """The loaded model. One model is kept, so another window may have put its own in its place."""
    if not loaded(meta):
        raise MissingDataError(
            f"{meta['model']} was replaced in another window: open this page again and load it"
        )
    return _models()[_model_key(meta)]


def load_sae(meta: dict[str, Any]) -> Any:
    """The SAE of an index."""
    return _load_sae(str(find_sae(workspace(), meta)))


@st.cache_resource(max_entries=2, show_spinner=False)
def _load_sae(path: str) -> Any:
    from saes.sae import SAE

    return SAE.load(path)


@st.cache_resource(max_entries=4, show_spinner=False)
def _train_mean(store: str, hook: str) -> Any:
    from cache.store import ActivationStore

    return ActivationStore.open(Path(store)).stats(hook, split="train", skip="first").mean


def train_mean(meta: dict[str, Any]) -> Any:
    """Mean of the store's training rows at the hook that the SAE reconstructs, float64 [d]."""
    hook = meta.get("out_hook") or meta["hook"]
    return _train_mean(str(workspace() / "activations" / meta["store"]), hook)


def model_button(meta: dict[str, Any]) -> bool:
    """True once the model is loaded; until then the one button that loads it."""
    if loaded(meta):
        return True
    source = st.text_input(
        "Model",
        value=meta.get("model_source") or meta["model"],
        key="model_source",
        max_chars=300,
        help="Packaged name, local folder or hub id",
    )
    muted("Runs on this machine. The weights must be those that the SAE was trained on.")
    if st.button("Load the model", type="primary", key="load_model"):
        try:
            with st.spinner("Loading model and SAE"):
                load(meta, (source or meta["model"]).strip())
        except AtomscopeError as e:
            line(str(e))
            return False
        st.rerun()
    return False


def style() -> None:
    st.html(HTML(theme.stylesheet(theme_name())))
