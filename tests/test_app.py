"""The app's pages on an empty workspace, a finished tiny one, and with ids that do not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from streamlit.testing.v1 import AppTest

from app import serve
from cache.errors import UsageError
from saes import FeatureIndex
from saes.labels import label_events

if TYPE_CHECKING:
    from tests.workspaces import TinyWorkspace

pytest_plugins = ("tests.workspaces",)
ROOT = Path(__file__).resolve().parent.parent
PAGES = ("home", "curves", "features", "inspect", "steer")
MODEL_PAGES = ("inspect", "steer")


@pytest.fixture(autouse=True)
def no_leftover_model() -> Any:
    """Each test starts without a loaded model."""
    import streamlit as st

    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


def open_page(screen: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> AppTest:
    at = AppTest.from_file(str(ROOT / "app/main.py"), default_timeout=60)
    if screen != "home":
        # The first run, which only registers the pages, is on the home page: cheap without a workspace.
        monkeypatch.setenv("ATOMSCOPE_HOME", str(workspace / "none"))
        checked(at.run()).switch_page(f"screens/{screen}.py")
    monkeypatch.setenv("ATOMSCOPE_HOME", str(workspace))
    for name, value in parameters.items():
        at.query_params[name] = value
    return checked(at.run())


def checked(at: AppTest) -> AppTest:
    assert not at.exception, [e.stack_trace for e in at.exception]
    return at


def words(at: AppTest) -> str:
    """All markup of the page, as it is sent."""
    return "\n".join(h.proto.body for h in at.html)


def load(at: AppTest, workspace: TinyWorkspace) -> AppTest:
    at.text_input(key="model_source").set_value(str(workspace.model_dir))
    return checked(at.button(key="load_model").click().run())


def button(at: AppTest, label: str) -> Any:
    return next(b for b in at.button if b.label == label)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_workspace_says_which_command_fills_it(page, exists, tmp_path, monkeypatch) -> None:
    workspace = tmp_path / "nothing"
    if exists:
        workspace.mkdir()
    at = open_page(page, workspace, monkeypatch)
    assert "atomscope demo" in words(at)
    assert workspace.exists() == exists, "looking makes nothing"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_on_a_finished_workspace(page, tiny_workspace, monkeypatch) -> None:
    for sae in tiny_workspace.sae_ids.values():
        at = open_page(page, tiny_workspace.path, monkeypatch, sae=sae)
        assert at.selectbox(key="sae").value == sae
        assert "atomscope demo" not in words(at)


BAD_FEATURES = ["96", "-1", "1e3", "../../etc/passwd", "9" * 70, "<b>", "٣"]


@pytest.mark.parametrize(("page", "fid"), [("steer", "96"), *(("features", f) for f in BAD_FEATURES)])
def test_a_bad_feature_id_in_the_url_is_named(page, fid, tiny_workspace, monkeypatch) -> None:
    at = open_page(page, tiny_workspace.path, monkeypatch, fid=fid)
    assert "is not a feature of this SAE: ids go from 0 to 95" in words(at)
    assert "<b>" not in words(at).split("is not a feature")[0][-10:]


@pytest.mark.parametrize(
    ("page", "sae"), [("features", "0000000000000000"), ("inspect", "../../etc"), ("steer", "<script>")]
)
def test_an_unknown_sae_in_the_url_is_named(page, sae, tiny_workspace, monkeypatch) -> None:
    at = open_page(page, tiny_workspace.path, monkeypatch, sae=sae)
    assert "No SAE with the id" in words(at) and "<script>" not in words(at)


def firing(workspace: TinyWorkspace) -> list[int]:
    """Features that fire at least once, in the order of their ids: the list leaves out the others."""
    index = FeatureIndex.open(workspace.path, workspace.topk)
    counts = index.frame("SELECT feature FROM idx.feature WHERE n_fire > 0 ORDER BY feature")
    return [int(f) for f in counts["feature"]]


def test_training_curves_show_every_metric_of_the_chosen_run(tiny_workspace, monkeypatch) -> None:
    at = open_page("curves", tiny_workspace.path, monkeypatch)
    assert len(at.get("plotly_chart")) == 6 and "1 of the SAEs" in words(at)
    at.multiselect(key="run").set_value([]).run()
    assert "Choose a run" in words(checked(at))
    junk = open_page("curves", tiny_workspace.path, monkeypatch, run="<script>", x="'; DROP")
    assert "<script>" not in words(junk)


def test_other_nonsense_in_the_url_is_ignored(tiny_workspace, monkeypatch) -> None:
    junk = {"mode": "x", "sort": "'; DROP", "dens": "a", "page": "-3", "kind": "x", "width": "x", "sign": "x"}
    shown = words(open_page("features", tiny_workspace.path, monkeypatch, sae=tiny_workspace.topk, **junk))
    assert f"{len(firing(tiny_workspace))} of 96 features" in shown
    wild = {"op": "x", "strength": "nan", "where": "x", "tokens": "1e9", "temp": "x", "seed": "-"}
    open_page("steer", tiny_workspace.path, monkeypatch, **wild)


def test_a_damaged_index_is_named_and_the_app_goes_on(tiny_workspace, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "ws/features/x@y"
    folder.mkdir(parents=True)
    (folder / "current.json").write_text("{")
    for page in PAGES:
        assert "is not valid JSON" in words(open_page(page, tmp_path / "ws", monkeypatch)) or page == "home"


def test_no_token_or_label_is_sent_as_markup(tiny_workspace, monkeypatch) -> None:
    for sae in tiny_workspace.sae_ids.values():
        for kind in ("Top", "Quantiles", "Random"):
            page = words(open_page("features", tiny_workspace.path, monkeypatch, sae=sae, kind=kind))
            assert not any(t in page for t in tiny_workspace.hostile if "<" in t or ord(t[0]) > 255)
            assert "&lt;script&gt;" in page or "&lt;img" in page, "the hostile tokens are there, as text"


def test_text_from_data_never_goes_through_markdown(tiny_workspace, monkeypatch) -> None:
    for page in PAGES:
        at = open_page(page, tiny_workspace.path, monkeypatch)
        for element in [*at.markdown, *at.caption, *at.error, *at.warning]:
            assert not any(t in element.value for t in tiny_workspace.hostile)


def test_token_search_and_density_filter_narrow_the_list(tiny_workspace, monkeypatch) -> None:
    at = open_page(
        "features", tiny_workspace.path, monkeypatch, mode="Token", q="rain", sae=tiny_workspace.topk
    )
    page = words(at)
    assert "that fire on ␣rain" in page and f"{len(firing(tiny_workspace))} of 96 features" not in page
    at = open_page("features", tiny_workspace.path, monkeypatch, dens="-6")
    at.slider(key="dens").set_value((-1.5, 0.0)).run()
    shown = at.dataframe[0].value["density"]
    assert len(shown) and (shown >= 100 * 10**-1.5).all()
    at = open_page("features", tiny_workspace.path, monkeypatch, q="no label has this")
    assert "Nothing matches" in words(at)


def test_pages_of_the_list_hold_every_feature_once(tiny_workspace, monkeypatch) -> None:
    seen: list[int] = []
    for number in ("1", "2"):
        at = open_page(
            "features", tiny_workspace.path, monkeypatch, sort="by id", page=number, sae=tiny_workspace.topk
        )
        seen += at.dataframe[0].value["feature"].tolist()
    assert seen == firing(tiny_workspace) and len(seen) > 90


def test_choosing_a_row_opens_its_feature(tiny_workspace, monkeypatch) -> None:
    at = open_page("features", tiny_workspace.path, monkeypatch, sort="by id", fid="7")
    assert ">7</span>" in words(at)
    at = checked(button(at, "Random").click().run())
    assert at.text_input(key="fid").value.isdigit()


def test_both_poles_of_a_signed_feature_are_shown(tiny_workspace, monkeypatch) -> None:
    from saes import FeatureIndex

    index = FeatureIndex.open(tiny_workspace.path, tiny_workspace.abs_topk)
    both = index.frame("SELECT feature FROM idx.feature WHERE n_pos > 0 AND n_neg > 0")["feature"]
    fid = str(both.iloc[0])
    plus, minus = (
        words(open_page("features", tiny_workspace.path, monkeypatch, sae=index.sae_id, fid=fid, sign=s))
        for s in ("positive", "negative")
    )
    assert ">+" in plus and ">−" in minus and plus != minus
    one_sided = open_page("features", tiny_workspace.path, monkeypatch, sae=tiny_workspace.topk)
    assert not [p for p in one_sided.get("button_group") if "negative" in str(p.proto)]


def test_a_label_is_appended_and_shown(tiny_workspace, monkeypatch) -> None:
    before = len(label_events(tiny_workspace.path))
    at = open_page("features", tiny_workspace.path, monkeypatch, fid="3")
    next(t for t in at.text_input if t.label == "Label").set_value("rain & <i>shelter</i>")
    next(t for t in at.text_input if t.label == "Author").set_value("ada")
    at = checked(button(at, "Save label").click().run())
    events = label_events(tiny_workspace.path)
    assert len(events) == before + 1
    assert (events[-1]["feature"], events[-1]["text"], events[-1]["author"]) == (
        3,
        "rain & <i>shelter</i>",
        "ada",
    )
    assert "rain &amp; &lt;i&gt;shelter" in words(at)
    found = open_page("features", tiny_workspace.path, monkeypatch, q="shelter")
    assert found.dataframe[0].value["feature"].tolist() == [3]


def test_an_empty_label_is_not_saved(tiny_workspace, monkeypatch) -> None:
    before = len(label_events(tiny_workspace.path))
    at = open_page("features", tiny_workspace.path, monkeypatch, fid="3")
    at = checked(button(at, "Save label").click().run())
    assert "label is empty" in words(at) and len(label_events(tiny_workspace.path)) == before


def test_home_lists_measures_beside_their_controls(tiny_workspace, monkeypatch) -> None:
    page = words(open_page("home", tiny_workspace.path, monkeypatch))
    for word in ("ΔCE, nats", "untrained dictionary", "PCA, 4", "abs-topk", "complete", "held out"):
        assert word in page, word


def test_a_failed_run_is_shown_as_failed_and_not_as_interrupted(tmp_path, monkeypatch) -> None:
    from cache.errors import DataError
    from saes import TrainConfig, presets, train
    from tests.corpora import make_store

    store, _ = make_store(tmp_path, d=8)
    job = TrainConfig(steps=12, batch_size=16, log_every=1, warmup_steps=0, grad_clip=0, screen="off")
    good = presets.topk(d_sae=32, k=2, lr=1e-3, name="good")
    bad = presets.topk(d_sae=32, k=2, lr=1e30, name="bad")
    train(store, [good, bad], job)
    with pytest.raises(DataError):
        train(store, [bad], job)
    home = words(open_page("home", tmp_path, monkeypatch))
    assert home.count("Failed: ") == 2 and home.count("of SAE bad: lower lr") == 2
    assert "goes on where it was" not in home
    curves = open_page("curves", tmp_path, monkeypatch)
    names = curves.multiselect(key="run").options
    shown = words(checked(curves.multiselect(key="run").set_value(names).run()))
    assert "Failed: " in shown and "1-bad: " in shown and "interrupted" not in shown


@pytest.mark.parametrize("page", MODEL_PAGES)
def test_a_model_that_is_not_there_gives_one_line(page, tiny_workspace, tmp_path, monkeypatch) -> None:
    at = open_page(page, tiny_workspace.path, monkeypatch)
    at.text_input(key="model_source").set_value(str(tmp_path / "nowhere"))
    at = checked(at.button(key="load_model").click().run())
    assert "no model" in words(at)


def test_two_models_of_one_name_are_told_apart_by_their_weights(monkeypatch) -> None:
    from app import state

    state._models()["aaa"] = "the first model"
    assert state.loaded({"model": "final", "model_sha": "aaa"})
    assert not state.loaded({"model": "final", "model_sha": "bbb"})


def test_other_weights_than_the_trained_ones_are_refused(tiny_workspace, tiny_dir, monkeypatch) -> None:
    at = open_page("steer", tiny_workspace.path, monkeypatch)
    at.text_input(key="model_source").set_value(str(tiny_dir))
    at = checked(at.button(key="load_model").click().run())
    assert "name the model it was trained on" in words(at)


def test_inspector_shows_features_of_a_text(tiny_workspace, monkeypatch) -> None:
    at = load(open_page("inspect", tiny_workspace.path, monkeypatch), tiny_workspace)
    at.text_area(key="prompt").set_value(f"The cat waited {tiny_workspace.hostile[0]} in the garden.")
    at = checked(button(at, "Run").click().run())
    page = words(at)
    assert "Unexplained share of each token" in page and "&lt;script&gt;" in page and "<script>" not in page
    frame = at.dataframe[0].value
    assert len(frame) and (frame["value"].abs().diff().dropna() <= 1e-6).all(), "strongest first"


def test_inspector_refuses_texts_it_cannot_take(tiny_workspace, monkeypatch) -> None:
    at = load(open_page("inspect", tiny_workspace.path, monkeypatch), tiny_workspace)
    for text, reason in (("", "prompt is empty"), ("The", "one token"), ("xqz!" * 400, "takes 512")):
        at.text_area(key="prompt").set_value(text)
        at = checked(button(at, "Run").click().run())
        assert reason in words(at), text[:10]


def steered(at: AppTest, workspace: TinyWorkspace, **values: Any) -> AppTest:
    at = load(at, workspace)
    at.text_area(key="prompt").set_value("The cat waited in the")
    at.number_input(key="tokens").set_value(6)
    for key, value in values.items():
        at.number_input(key=key).set_value(value)
    return checked(at.button(key="generate").click().run())


def test_steering_shows_both_texts_and_what_the_edit_did(tiny_workspace, monkeypatch) -> None:
    at = open_page("steer", tiny_workspace.path, monkeypatch, fid="5")
    page = words(steered(at, tiny_workspace, strength=2.0))
    for word in (
        "Baseline",
        "Steered",
        "Perplexity",
        "Repeated 3-grams",
        "KL",
        "add feature 5 +2.00 × residual norm",
    ):
        assert word in page, word


def test_steering_with_strength_zero_shows_the_same_text_twice(tiny_workspace, monkeypatch) -> None:
    at = steered(open_page("steer", tiny_workspace.path, monkeypatch, fid="5"), tiny_workspace, strength=0.0)
    result = at.session_state["steered"]
    assert result.baseline == result.steered and result.effects.kl_per_token == 0 and "the same" in words(at)


@pytest.mark.parametrize("op", ["Clamp", "Ablate"])
def test_the_other_operations_run(op, tiny_workspace, monkeypatch) -> None:
    at = open_page(
        "steer",
        tiny_workspace.path,
        monkeypatch,
        fid="14",
        op=op,
        sae=tiny_workspace.abs_topk,
        sign="negative",
    )
    page = words(steered(at, tiny_workspace))
    assert f"{op.lower()} feature 14, pole −" in page


def test_generating_without_a_feature_or_a_prompt_gives_one_line(tiny_workspace, monkeypatch) -> None:
    at = load(open_page("steer", tiny_workspace.path, monkeypatch), tiny_workspace)
    assert "No feature is chosen" in words(checked(at.button(key="generate").click().run()))
    at.text_input(key="fid").set_value("5")
    assert "prompt is empty" in words(checked(at.button(key="generate").click().run()))


def test_slider_and_number_box_show_one_strength(tiny_workspace, monkeypatch) -> None:
    at = open_page("steer", tiny_workspace.path, monkeypatch, strength="1.25")
    assert at.number_input(key="strength").value == at.slider(key="slide").value == 1.25
    at = checked(at.slider(key="slide").set_value(-0.5).run())
    assert at.number_input(key="strength").value == -0.5
    at = checked(at.number_input(key="strength").set_value(7.0).run())
    assert at.slider(key="slide").value == 2.0, "the slider ends where the useful range does"


def test_a_busy_model_gives_one_line(tiny_workspace, monkeypatch) -> None:
    from app import state

    at = load(open_page("steer", tiny_workspace.path, monkeypatch, fid="5"), tiny_workspace)
    at.text_area(key="prompt").set_value("The cat")
    monkeypatch.setattr(state, "LOCK_SECONDS", 0.0)
    with state.model_lock():
        at = checked(at.button(key="generate").click().run())
    assert "busy in another window" in words(at)
    assert "Perplexity" in words(checked(at.button(key="generate").click().run())), "the lock is free again"


def test_browsing_does_not_import_torch(tiny_workspace) -> None:
    code = """
import sys
from streamlit.testing.v1 import AppTest
for page in ("home", "features", "inspect", "steer"):
    at = AppTest.from_file("app/main.py", default_timeout=60).run()
    if page != "home":
        at.switch_page(f"screens/{page}.py").run()
    assert not at.exception, at.exception
    assert len(at.html) > 4
print(sorted({"torch", "transformers", "transformer_lens"} & set(sys.modules)))
"""
    env = os.environ | {"ATOMSCOPE_HOME": str(tiny_workspace.path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[]"), done.stdout


def test_server_flags_bind_to_this_machine_only(monkeypatch, tmp_path) -> None:
    line = " ".join(serve.command(8501))
    assert "--server.address 127.0.0.1" in line and "--browser.gatherUsageStats false" in line
    assert serve.environment(tmp_path)["ATOMSCOPE_HOME"] == str(tmp_path)


def test_a_taken_port_is_passed_over() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind((serve.HOST, 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        assert wanted < serve.free_port(wanted) <= wanted + 100
    with pytest.raises(UsageError, match="1 to 65535"):
        serve.free_port(0)
