"""The command line: the whole path on a tiny model, exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    assert code == 0 and "held-out FVU" in out and "pca-5" in out and "random" in out
    code, out, _ = run(capsys, "index", "latest", *model, *w)
    assert code == 0 and (Path(out.strip()) / "current.json").is_file()
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
    for command in [*commands, "feature list", "feature show", "steer", "app", "demo", "doctor"]:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *command.split(), "--help"], capture_output=True, text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        assert done.returncode == 0 and "Usage" in done.stdout, command
