"""The command `atomscope`: the same functions as in Python, one command a step.

stdout is data (`--json` for machines), stderr is progress and errors. Exit codes: 0 ok, 1 failure, 2 usage,
3 missing data, 130 interrupted (a checkpoint is written).
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app import analysis_commands, attribution_commands, data_commands, jobs, sweep, training_data
from app.label_commands import labels
from app.lookup import AsJson, Workspace, emit, open_store, sae_folder, sae_id_of
from app.sae_commands import open_command, sae
from app.store_commands import store
from cache.errors import AtomscopeError, UsageError
from cache.workspace import workspace_path

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders from activations to steering: harvest -> train -> evaluate -> index -> app.",
)
feature = typer.Typer(no_args_is_help=True, help="Features of an index.")
for name, group in (
    ("models", data_commands.models),
    ("corpus", data_commands.corpus),
    ("store", store),
    ("feature", feature),
    ("labels", labels),
    ("sae", sae),
):
    app.add_typer(group, name=name)


# ---- data ----


app.command("harvest")(data_commands.harvest)


# ---- SAEs ----


@app.command()
def train(
    store_name: Annotated[
        str, typer.Argument(metavar="STORE", help="Store folder, name or latest.")
    ] = "latest",
    hook: Annotated[
        str | None, typer.Option(help="Hook to train on; needed where the store has several.")
    ] = None,
    out_hook: Annotated[
        str | None, typer.Option(help="Train transcoders: from --hook they predict this hook.")
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            metavar="SAE", help="Start from this SAE's weights: folder, run name, sae_id or latest."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with saes:, train: and grid:.")] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"{', '.join(jobs.NAMES)}; default topk. Without a YAML file.")
    ] = None,
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Latents.")] = None,
    k: Annotated[int | None, typer.Option(help="Active latents a token.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. saes.0.k=64 or train.seed=1.")
    ] = None,
    on_the_fly: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="Harvest this corpus while training; no store is kept."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model of --on-the-fly: packaged name, local folder or hub id.")
    ] = "smollm2-135m-instruct-q4_1",
    disk_gb: Annotated[float, typer.Option(help="Most that --on-the-fly puts on disk, in 10^9 bytes.")] = 4.0,
    window: Annotated[
        int,
        typer.Option(help="Row groups (about 6 MB) that --on-the-fly mixes; a store: --set train.window=64."),
    ] = 32,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="Memory for SAEs trained together, in 10^9 bytes; default: 0.8 of what is free."),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(metavar="PROJECT", help="Send the metrics to this Weights & Biases project too."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the resolved job with memory and disk estimates, and stop.")
    ] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Train SAEs on a store, or on the fly: all of a job's SAEs in one pass. Goes on where an earlier run stopped."""
    job = jobs.read_job(config)
    given_sae = {"preset": preset, "d_sae": d_sae, "k": k}
    given_sae = {key: v for key, v in given_sae.items() if v is not None}
    if config is not None and given_sae:
        raise UsageError("the job file names the SAEs: change them there, or with --set saes.0.k=64")
    if given_sae:
        if d_sae is None:
            raise UsageError("give --d-sae, the number of latents, with --preset and --k")
        job["saes"] = [given_sae]
    given = {"steps": steps, "batch_size": batch_size, "lr": lr}
    job["train"] = (job.get("train") or {}) | {key: v for key, v in given.items() if v is not None}
    jobs.override(job, assign or [])
    budget_asked, expanded = sweep.memory_budget(memory_gb), sweep.expand(job)
    data = (
        training_data.stored(store_name, hook, workspace, out_hook)
        if on_the_fly is None
        else training_data.on_the_fly(
            on_the_fly, model, hook, workspace, disk_gb=disk_gb, window=window, out_hook=out_hook
        )
    )
    # latest is looked up once: the next start, and the next run of a sweep, would find another one
    start = None if warm_start is None else sae_folder(warm_start, workspace)
    if start is not None and warm_start == "latest":
        print(
            f"warm start from {start}: the same again with --warm-start {sae_id_of(start)}", file=sys.stderr
        )
    where: dict[str, Any] = {"hook": data.hook, "out_hook": data.out_hook, "warm_start": start}
    # a dry run makes no ring, so it does not know what such a ring has begun
    source = None if dry_run and on_the_fly is not None else data.open()
    begun = None if source is None else sweep.begun(expanded, source, budget_asked is not None, **where)
    runs, budget = sweep.plan(
        expanded, data.d_model, data.d_out, budget_asked, begun, rows=data.rows, window=data.window
    )
    described = data.described | ({} if start is None else {"warm_start": str(start)})
    if dry_run:
        print(sweep.described(runs, described, data.disk_bytes, as_json))
        return
    for line in sweep.before(runs, budget):
        print(line, file=sys.stderr)
    results, failed = sweep.train_all(runs, source, **where, wandb=wandb)
    if source is not None and on_the_fly is not None:
        source.remove()
    rows = [{"path": str(r.path), "sae_id": r.sae.sae_id, **r.metrics[-1]} for r in results]
    emit(
        rows,
        as_json,
        "\n".join(f"{r['path']}  fvu {r['fvu']:.4f}  l0 {r['l0']:.1f}  dead {r['n_dead']:.0f}" for r in rows),
    )
    sweep.check(failed, len(results))


@app.command()
def evaluate(
    sae: Annotated[str, typer.Argument(help="SAE folder, run name, sae_id or latest.")] = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    model: Annotated[str | None, typer.Option(help="Model; default: the store's.")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Held-out tokens for the cross-entropy; 0 leaves it out.")
    ] = 5000,
    token_classes: Annotated[
        bool, typer.Option(help="Also on template tokens, position 0 and content apart.")
    ] = False,
    skip: Annotated[
        str,
        typer.Option(
            help="Rows left out: first, special, not_assistant, several joined by +, or none. own: what the SAE's conventions "
            "say, position 0 unless it was trained on it."
        ),
    ] = "own",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Reconstruction, delta CE and controls (PCA, untrained dictionary) on held-out documents."""
    from app.demo import evaluation_lines
    from app.terminal import class_lines
    from cache import load_model
    from saes import SAE
    from saes import evaluate as run

    data, loaded = open_store(store_name, workspace), SAE.load(sae_folder(sae, workspace))
    lm = load_model(model or data.model_source, workspace=data.workspace) if max_tokens else None
    rows = None if skip == "none" else skip
    result = run(loaded, data, lm, max_tokens=max_tokens, token_classes=token_classes, skip=rows)
    lines = evaluation_lines(result.rows) + (class_lines(result.rows) if token_classes else [])
    emit(result.rows, as_json, "\n".join(lines))


@app.command()
def index(
    sae: Annotated[str, typer.Argument(help="SAE folder, run name, sae_id or latest.")] = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    model: Annotated[str | None, typer.Option(help="Model for the logit lens; default: the store's.")] = None,
    skip: Annotated[
        str, typer.Option(help="Rows left out: first, special, not_assistant, several joined by +, or none.")
    ] = "first",
    partial: Annotated[
        bool, typer.Option(help="Index the shards that are there; run it again when there are more.")
    ] = False,
    workspace: Workspace = None,
) -> None:
    """Build the feature index that the explorer reads, or bring it up to date with a store that has grown."""
    from cache import load_model
    from saes import SAE, build_index

    data, folder = open_store(store_name, workspace), sae_folder(sae, workspace)
    lm = load_model(model or data.model_source, workspace=data.workspace)
    inside = folder.resolve().is_relative_to(data.workspace)
    rows = None if skip == "none" else skip
    path = folder if inside else None
    print(build_index(SAE.load(folder), data, lm, sae_path=path, skip=rows, partial=partial))


@feature.command("list")
def feature_list(
    query: Annotated[str, typer.Argument(help="Text to look for.")] = "",
    mode: Annotated[str, typer.Option(help="label, token or id.")] = "token",
    sort: Annotated[str, typer.Option(help="match, density, max_act, feature ...")] = "match",
    limit: int = 20,
    sae_id: Annotated[str | None, typer.Option(help="SAE; default: the newest index.")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Features that fire on a token, carry a label, or have an id."""
    from saes import FeatureIndex

    frame, total = FeatureIndex.open(workspace, sae_id).list_features(
        query, mode=mode, sort=sort, limit=limit
    )
    frame = frame.drop(columns="hist")
    text = frame.to_string(index=False) + f"\n{len(frame)} of {total} features"
    emit(json.loads(frame.to_json(orient="records")), as_json, text)


@feature.command("show")
def feature_show(
    feature: int,
    n: Annotated[int, typer.Option(help="Contexts to show.")] = 10,
    width: Annotated[int, typer.Option(help="Tokens of a context.")] = 16,
    sign: Annotated[int, typer.Option(help="1 or -1 (the negative pole of a signed SAE).")] = 1,
    sae_id: Annotated[str | None, typer.Option(help="SAE; default: the newest index.")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """A feature in the terminal: how often it fires, its top contexts, and the tokens it raises and lowers."""
    from app.terminal import feature_text
    from saes import FeatureIndex

    found = FeatureIndex.open(workspace, sae_id)
    shown = found.feature(feature)
    contexts = found.examples(feature, sign=sign, n=n, width=width)
    value = {
        "feature": feature, "label": shown["label"], "density": shown["density"], "max_act": shown["max_act"],
        "contexts": [{"value": e.value, "text": "".join(e.tokens), "doc": e.doc, "row": e.row} for e in contexts],
        "logits": found.logits(feature).to_dict("records"),
    }  # fmt: skip
    emit(value, as_json, feature_text(found, shown, contexts))


feature.command("proxies")(analysis_commands.feature_proxies)
feature.command("document")(analysis_commands.feature_document)
app.command("compare")(analysis_commands.compare)
app.command("atoms")(analysis_commands.atoms)
app.command("attribute")(attribution_commands.attribute)


app.command("open")(open_command)


# ---- model and app ----


@app.command()
def steer(
    prompt: str,
    feature: Annotated[int, typer.Option(help="Feature to steer with.")],
    strength: Annotated[
        float, typer.Option(help="In units of the mean residual norm; useful values are 0.1 to 0.5.")
    ] = 0.3,
    op: Annotated[str, typer.Option(help="add, clamp or ablate.")] = "add",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    sae_id: Annotated[str | None, typer.Option(help="SAE; default: the newest index.")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with and without one feature, in lock-step."""
    from cache import load_model
    from saes import SAE, FeatureIndex
    from saes.queries import find_sae
    from steering import Direction, Edit, generate

    found = FeatureIndex.open(workspace, sae_id)
    found.feature(feature)
    sae = SAE.load(find_sae(found.workspace, found.meta))
    edit = Edit(
        direction=Direction.from_sae_feature(sae, feature), op=op, strength=strength,  # type: ignore[arg-type]
        unit_norm=found.meta["mean_resid_norm"],
    )  # fmt: skip
    model = load_model(found.meta["model_source"], workspace=found.workspace)
    texts = ["", ""]
    steps = generate(
        model, prompt, edits=[edit], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    for step in steps:
        texts[0] += step.baseline_text
        texts[1] += step.steered_text
    value = {
        "prompt": prompt,
        "feature": feature,
        "strength": strength,
        "baseline": texts[0],
        "steered": texts[1],
    }
    emit(value, as_json, f"baseline: {prompt}{texts[0]}\n\nsteered:  {prompt}{texts[1]}")


@app.command("app")
def serve_app(
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; the next free one is taken if it is in use.")
    ] = 8501,
    workspace: Workspace = None,
) -> None:
    """Open the explorer on 127.0.0.1."""
    from app.serve import serve

    serve(workspace_path(workspace), port=port)


@app.command()
def demo(
    serve: Annotated[bool, typer.Option(help="Open the explorer at the end.")] = True,
    port: int = 8501,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """The whole path on the packaged model: fetch, harvest, train, evaluate, index, explore."""
    from app.demo import run_demo, summary_lines

    root = workspace_path(workspace)
    record = run_demo(root)
    emit(record, as_json, "\n" + "\n".join(summary_lines(record)))
    if serve:
        serve_app(port=port, workspace=root)


@app.command()
def doctor(workspace: Workspace = None, as_json: AsJson = False) -> None:
    """Versions, processor and workspace: what to put into a bug report."""
    from app.terminal import doctor_report

    report = doctor_report(workspace_path(workspace))
    emit(report, as_json, "\n".join(f"{key:<22}{value}" for key, value in report.items()))


INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point: one line for an error that the user can act on, and its exit code."""
    try:
        # without its standalone mode typer returns the exit code, and 130 for an interrupt
        code = app(standalone_mode=False)
    except AtomscopeError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
    except OSError as e:
        if e.errno not in _DISK_FULL:
            raise
        print(
            f"error: {e.strerror or e}: free some disk space; the same command goes on from here",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except Exception as e:
        show = getattr(e, "show", None)
        if show is None:
            raise
        show()
        raise SystemExit(2) from None
    if code == INTERRUPTED:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
