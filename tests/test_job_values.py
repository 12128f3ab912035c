"""Wrong values in a job file or --set: one line with the key and what is wanted; and what a job file may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import jobs, sweep
from cache.errors import MissingDataError, UsageError
from saes import presets
from saes.config import SAEConfig
from tests.test_cli import run


@pytest.mark.parametrize(
    ("assign", "words"),
    [
        ("saes.0.name=5", "name must be text, got 5"),
        ("saes.0.name=null", "name must be text"),
        ("saes.0.name=2020-13-45", "not a YAML value"),
        ("saes.0.hook=[a]", "hook must be text"),
        ("saes.0.matryoshka=5", "matryoshka must be a list of whole numbers.*got 5"),
        ("saes.0.matryoshka=[a,b]", "matryoshka must be a list of whole numbers"),
        ("saes.0.matryoshka=[50.5,100]", "matryoshka must be a list of whole numbers"),
        ("saes.0.matryoshka=abc", "matryoshka must be a list of whole numbers"),
        ("saes.0.matryoshka=[[1],2]", "matryoshka must be a list of whole numbers"),
        ("saes.0.matryoshka=null", "matryoshka must be a list of whole numbers"),
        ("saes.0.preset=[a]", r"no preset \['a'\]"),
        ("saes.0.preset={a: b}", "no preset"),
        ("saes.0.preset=null", "no preset None"),
        ("saes.0.bandwidth=.nan", "bandwidth must be above 0"),
        ("saes.0.bandwidth=.inf", "bandwidth must be above 0"),
        ("saes.0.bandwidth=[1]", "bandwidth must be a number"),
        ("saes.0.space=[raw]", "space"),
        ("saes.0.data={a: 1}", "data"),
        ("saes.0.bias_rule=[gba]", "bias_rule"),
        ("saes.0.encoder_init=[tied]", "encoder_init"),
        ("saes.0.lr=.nan", "lr must be above 0"),
        ("saes.0.d_sae=.inf", "d_sae must be a whole number"),
        ("saes.0.d_sae=null", "d_sae must be a whole number"),
        ("saes.².k=1", "the list has items 0 to 0"),
        ("saes=[{d_sae: 64, 5: 1}]", "5 is not the name of a field"),
        ("saes=[{d_sae: 64, 5: 1, x: 2}]", "5 is not the name of a field"),
        ("train={5: 1, x: 2}", "5 is not the name of a field"),
        ("train.skip=5", "skip must be text"),
        ("train.split=[a]", "split"),
        ("train.screen=[a]", "screen"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_the_key_and_what_is_wanted(assign: str, words: str) -> None:
    job: dict = {"saes": [{"d_sae": 64, "k": 4}], "train": {"steps": 10}}
    with pytest.raises(UsageError, match=words) as e:
        jobs.override(job, [assign])
        sweep.expand(job)
    assert "\n" not in str(e.value)


def test_wrong_values_are_refused_in_python_too() -> None:
    for field, value in (
        ("name", 5), ("matryoshka", 5), ("matryoshka", "ab"), ("matryoshka", [8.5, 16]), ("bandwidth", float("nan"))
    ):  # fmt: skip
        with pytest.raises(UsageError, match=field):
            SAEConfig(d_sae=64, k=4, **{field: value})


def test_prefixes_may_be_written_like_other_whole_numbers() -> None:
    job: dict = {"saes": [{"preset": "matryoshka", "d_sae": 2000, "k": 4}]}
    jobs.override(job, ["saes.0.matryoshka=[1e2, 500.0, 1000]"])
    assert jobs.resolve(job)[0][0].matryoshka == (100, 500, 1000)
    assert SAEConfig(d_sae=64, k=4, matryoshka=range(8, 32, 8)).matryoshka == (8, 16, 24)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is a folder"),
        (b"saes: [{name: \xff\xfe}]", "not UTF-8"),
        (b"saes: [{name: 2020-13-45}]", "not valid YAML"),
        (b"train: 5", "train must be a mapping"),
        (b"- 1", "must hold a mapping"),
        (b"grid: {5: [1]}", "5 is not the name of a field"),
        (b"5: 1\nx: 2", "5 is not the name of a field"),
    ],
)
def test_a_file_that_is_no_job_is_one_line(capsys, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    code, out, err = run(capsys, "train", "latest", "--config", str(path), "-w", str(tmp_path))
    assert code == 2 and words in err and str(path) in err and err.count("\n") == 1 and not out


def test_a_job_file_that_is_not_there_is_missing_data(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no job file"):
        jobs.read_job(tmp_path / "none.yaml")


def test_fast_is_a_preset_of_a_job_and_takes_the_rows_that_it_needs() -> None:
    (config,), schedule = jobs.resolve({"saes": [{"preset": "fast", "d_sae": 64, "k": 4}]})
    assert config == presets.fast(presets.topk)(d_sae=64, k=4) and schedule.skip is None
    _, schedule = jobs.resolve(
        {"saes": [{"preset": "fast", "d_sae": 64, "k": 4}], "train": {"skip": "first"}}
    )
    assert schedule.skip == "first"  # what is asked for is not changed: training refuses it
    ((both, schedule),) = sweep.expand({"saes": [{"d_sae": 64}], "grid": {"k": [2, 4], "preset": ["fast"]}})
    assert [c.label for c in both] == ["fast-topk-64-k2", "fast-topk-64-k4"] and schedule.skip is None
    _, schedule = jobs.resolve({"saes": [{"preset": "topk", "d_sae": 64, "k": 4}]})
    assert schedule.skip == "first"
    with pytest.raises(UsageError, match="fast"):
        jobs.resolve({"saes": [{"preset": "slow", "d_sae": 64}]})


def test_the_command_trains_fast_on_dialogues_with_one_word(capsys, tmp_path: Path) -> None:
    from tests.corpora import make_store

    store, _ = make_store(tmp_path, d=8)
    args = ["--preset", "fast", "--d-sae", "32", "--k", "2", "--steps", "2", "--batch-size", "16"]
    code, out, err = run(capsys, "train", str(store.path), *args, "-w", str(tmp_path), "--dry-run")
    assert code == 0 and '"data": "fast"' in out and '"skip": null' in out, err
    code, _, err = run(capsys, "train", str(store.path), *args, "-w", str(tmp_path))
    assert code == 2 and "dialogue" in err  # this store is of plain text


def test_the_help_of_train_names_every_preset_that_a_job_takes() -> None:
    import inspect

    from typer.main import get_command

    from app.cli import app

    (option,) = [p for p in get_command(app).commands["train"].params if p.name == "preset"]  # type: ignore[attr-defined]
    named = str(option.help).partition(";")[0].split(", ")  # type: ignore[attr-defined]
    made = {
        n
        for n, f in inspect.getmembers(presets, inspect.isfunction)
        if f.__annotations__.get("return") == "SAEConfig"
    }
    assert set(named) == made | {"fast"} and len(named) == len(set(named))
    for name in named:
        (config,), _ = jobs.resolve({"saes": [{"preset": name, "d_sae": 64}]})
        assert config.d_sae == 64
