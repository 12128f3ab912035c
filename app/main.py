"""Entry of the Streamlit app: navigation, sidebar, style. Run it with `atomscope app`.

Streamlit puts this file's folder on the path, not the project's root; the root is added so that `app`, `saes`
and `cache` are found from a checkout as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from app import state  # noqa: E402

PAGES = {
    "Data": [
        st.Page("screens/home.py", title="Runs and datasets", url_path="home", default=True),
        st.Page("screens/curves.py", title="Training curves", url_path="curves"),
    ],
    "Features": [
        st.Page("screens/features.py", title="Explorer", url_path="features"),
        st.Page("screens/inspect.py", title="Prompt inspector", url_path="inspect"),
    ],
    "Measure": [
        st.Page("screens/compare.py", title="Compare SAEs", url_path="compare"),
        st.Page("screens/attribute.py", title="Attribution", url_path="attribute"),
    ],
    "Act": [st.Page("screens/steer.py", title="Steering", url_path="steer")],
}


def main() -> None:
    st.set_page_config(page_title="atomscope", layout="wide")
    page = st.navigation(PAGES, expanded=True)
    state.style()
    with st.sidebar:
        state.sae_choice()
        state.muted("workspace " + "/".join(state.workspace().parts[-2:]))
    page.run()


main()
