"""The command line: the whole path on a tiny model, exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from app import jobs
from app.cli import main
from cache.errors import UsageError
from tests.tiny import SENTENCES

HOOK = "blocks.1.hook_resid_post"


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `atomscope args`."""
    old, sys.argv, code = sys.argv, ["atomscope", *args], 0
    try:
        main()
    except SystemExit as e:
        code = int(e.code or 0)
    finally:
        sys.argv = old
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


def test_a_wrong_source_is_refused_before_a_tokenizer_is_loaded(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "corpus", "build", "boolk", "--model", "no-such-model", "-w", str(tmp_path))
    assert code == 2 and "boolk" in err and "boolq" in err and "no-such-model" not in err


def test_the_whole_path_by_commands(
    capsys, space: Path, text_file: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    w, model = ["-w", str(space)], ["--model", str(tiny_dir)]
    assert run(capsys, "corpus", "build", str(text_file), "--context", "64", *model, *w)[0] == 0
    assert run(capsys, "harvest", "latest", "--hook", HOOK, *model, *w)[0] == 0
    code, out, _ = run(capsys, "store", "info", *w, "--json")
    info = json.loads(out)
    assert code == 0 and info["hooks"][0]["hook"] == HOOK and info["hooks"][0]["complete"]
    assert "intact" in run(capsys, "store", "verify", *w)[1]
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump({"saes": [{"d_sae": 96, "k": 4}], "train": {"batch_size": 128, "screen": "off"}})
    )
    args = [
        "train",
        "latest",
        "--config",
        str(job),
        "--set",
        "train.steps=40",
        "--set",
        "saes.0.k=5",
        *w,
        "--json",
    ]
    code, out, _ = run(capsys, *args, "--dry-run")
    plan = json.loads(out)
    assert code == 0 and plan["saes"][0]["k"] == 5 and plan["train"]["steps"] == 40
    assert plan["estimate"]["memory_bytes"] > 0 and not list(space.glob("saes/*"))
    code, out, _ = run(capsys, *args)
    assert code == 0 and json.loads(out)[0]["l0"] <= 5
    code, out, _ = run(capsys, "evaluate", "latest", "--max-tokens", "300", *model, *w)
    assert code == 0 and "held-out FVU" in out and "pca-5" in out and "untrained" in out and "initial" in out
    code, out, _ = run(capsys, "index", "latest", *model, *w)
    assert code == 0 and (Path(out.strip()) / "current.json").is_file()
    again, same, _ = run(capsys, "index", "latest", "--partial", *model, *w)
    assert again == 0 and same == out
    code, _, err = run(capsys, "index", "latest", "--skip", "first+special", *model, *w)
    assert code == 2 and "skip='first'" in err
    code, out, _ = run(capsys, "feature", "document", "0", "--limit", "3", *w, "--json")
    assert code == 0 and len(json.loads(out)) == 3 and {"mass", "label"} <= json.loads(out)[0].keys()
    assert run(capsys, "feature", "document", "100000", *w)[0] == 3
    code, out, _ = run(capsys, "feature", "list", "the", *w, "--json")
    found = json.loads(out)
    assert code == 0 and found
    f = str(found[0]["feature"])
    code, out, _ = run(capsys, "feature", "show", f, *w)
    assert code == 0 and "[" in out and "raises:" in out
    code, out, _ = run(
        capsys, "steer", "The cat", "--feature", f, "--strength", "0", "--max-new-tokens", "5", *w, "--json"
    )
    texts = json.loads(out)
    assert code == 0 and texts["baseline"] == texts["steered"]


def test_unknown_names_are_one_line_with_the_known_ones(
    capsys, space: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    w = ["-w", str(space)]
    for args, exit_code, words in (
        (["store", "info", "nothing", *w], 3, "stores match"),
        (["evaluate", "nothing", *w], 3, "no SAE"),
        (["feature", "show", "123456", *w], 3, "0 to"),
        (["train", "latest", "--d-sae", "64", "--preset", "magic", *w], 2, "topk"),
        (["train", "latest", "--d-sae", "64", "--set", "train.speed=3", *w], 2, "speed"),
        (["train", "latest", *w], 2, "--d-sae"),
        (["feature", "list", "-w", str(tmp_path / "void")], 3, "no workspace"),
        (["harvest", "latest", "--hook", "blocks.1.hook_resid_pst", "--model", str(tiny_dir), *w], 2, HOOK),
        (["models", "fetch", "smollm2-135m", *w], 2, "smollm2-135m-instruct-q4_1"),
        (["no-such-command"], 2, "No such command"),
    ):
        code, _, err = run(capsys, *args)
        assert code == exit_code, (args, err)
        assert words in err, (args, err)
        if exit_code == 3:
            assert err.count("\n") == 1 and err.startswith("error: "), err


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs a folder that cannot be written"
)
def test_a_workspace_that_cannot_be_written_is_one_line(capsys) -> None:
    code, _, err = run(capsys, "models", "fetch", "x", "-w", "/proc/atomscope")
    assert code == 2 and "not writable" in err


def test_an_interrupted_command_ends_with_130_and_goes_on_later(space: Path, tmp_path: Path) -> None:
    from tests.corpora import make_store

    store, _ = make_store(tmp_path, [40] * 20)
    root = str(Path(__file__).resolve().parent.parent)
    args = ["train", str(store.path), "--d-sae", "48", "--k", "3", "--steps", "200000", "--batch-size", "64"]

    def started() -> int:
        """Changes when a run (re)writes its record, which it does right before its loop."""
        return max((p.stat().st_mtime_ns for p in tmp_path.glob("saes/*/run.json")), default=0)

    for stop in (signal.SIGINT, signal.SIGTERM):
        before = started()
        child = subprocess.Popen(
            [sys.executable, "-m", "app.cli", *args, "-w", str(tmp_path)], cwd=root, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while started() == before:
            assert child.poll() is None, child.communicate()[1]
        threading.Event().wait(0.5)
        child.send_signal(stop)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 130, err
        assert "goes on from here" in err
        assert list(tmp_path.glob("saes/*/checkpoints/step-*/state.json"))


def test_a_damaged_store_makes_verify_fail(capsys, tmp_path: Path) -> None:
    from tests.corpora import make_store

    store, _ = make_store(tmp_path)
    data = next(store.path.rglob("*.parquet"))
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    data.write_bytes(raw)
    code, out, _ = run(capsys, "store", "verify", str(store.path))
    assert code == 1 and data.name in out


@pytest.mark.parametrize(
    ("assign", "words"),
    [
        ("train.steps=abc", "whole number"),
        ("train.steps=1.5", "whole number"),
        ("train.lr=[", "YAML"),
        ("train.steps.x=1", "no fields"),
        ("saes.0.name=a/b", "folder"),
    ],
)
def test_a_bad_override_is_one_line(assign: str, words: str) -> None:
    job = {"saes": [{"d_sae": 64, "k": 4}], "train": {"steps": 10}}
    with pytest.raises(UsageError, match=words):
        jobs.override(job, [assign])
        jobs.resolve(job)


def test_whole_numbers_may_be_written_as_floats_and_a_warm_up_of_0_is_legal() -> None:
    job: dict = {"saes": [{"d_sae": 64, "k": 4}]}
    jobs.override(job, ["train.steps=1e2", "train.warmup_steps=0", "train.screen=off"])
    _, train = jobs.resolve(job)
    assert train.steps == 100 and train.screen == "off" and train.lr_at(0, 64) > 0


@pytest.mark.parametrize("job", [{"saes": [5]}, {"saes": {"k": 1}}, {"saes": [{"d_sae": 8}], "train": 5}])
def test_a_job_of_the_wrong_shape_is_one_line(job: dict) -> None:
    with pytest.raises(UsageError, match="must be"):
        jobs.resolve(job)


def test_flags_of_one_sae_and_a_job_file_do_not_mix(capsys, space: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("saes: [{d_sae: 64, k: 4}]")
    code, _, err = run(capsys, "train", "latest", "--config", str(job), "--k", "7", "-w", str(space))
    assert code == 2 and "--set saes.0.k" in err
    code, _, err = run(capsys, "train", "latest", "--k", "7", "-w", str(space))
    assert code == 2 and "--d-sae" in err


def test_overrides_reach_lists_and_refuse_nonsense() -> None:
    job = {"saes": [{"d_sae": 64, "k": 4}], "train": {}}
    jobs.override(job, ["saes.0.k=8", "train.lr=8e-4"])
    saes, train = jobs.resolve(job)
    assert saes[0].k == 8 and train.lr == pytest.approx(8e-4)
    for bad in ("saes.3.k=1", "train", "=2", "saes.0=1"):
        with pytest.raises(UsageError):
            jobs.override(job, [bad])


def test_every_command_has_help() -> None:
    commands = [
        "models list",
        "corpus build",
        "harvest",
        "store info",
        "store verify",
        "train",
        "evaluate",
        "index",
    ]
    for command in [
        *commands,
        "feature list",
        "feature show",
        "feature proxies",
        "compare",
        "atoms",
        "labels explain",
        "steer",
        "app",
        "demo",
        "doctor",
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *command.split(), "--help"], capture_output=True, text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        assert done.returncode == 0 and "Usage" in done.stdout, command
