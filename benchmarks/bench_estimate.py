"""How far the estimate of `harvest --dry-run` is from the run: disk, peak memory, seconds, each in a process of its own.

Prints one JSON line: said / took of disk bytes, of the growth of the resident set and of the seconds. Targets: disk and
memory within 20 % (0.8 to 1.25); seconds are for orientation, they follow what else the machine does.
The model is a local folder or a packaged name (--model), the corpus a packaged one; by default the packaged model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CHILD = """
import json, sys
from cache import Corpus, harvest, load_model
from cache.estimate import _peak

action, name, home, corpus, workspace, hooks = sys.argv[1:]
model, corpus = load_model(name, workspace=home), Corpus.open(corpus)
options = dict(hooks=hooks.split(","), workspace=workspace)
if action == "estimate":
    print(json.dumps(harvest(model, corpus, dry_run=True, **options).to_dict()))
else:
    with _peak() as peak:
        store = harvest(model, corpus, show_progress=False, **options)
    print(json.dumps({"memory_growth_bytes": peak[0], "seconds": store.last_run["seconds"]}))
"""


def child(*args: str) -> dict[str, float]:
    """One action in a fresh process."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *args], cwd=root, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from cache import build_corpus
    from cache.models import load_tokenizer
    from cache.workspace import workspace_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--hooks", default="blocks.3.hook_resid_post,blocks.4.hook_resid_post")
    args = parser.parse_args()
    home = workspace_path()
    with tempfile.TemporaryDirectory(dir=home / "_tmp") as folder:
        tokenizer = load_tokenizer(args.model, workspace=home)
        corpus = build_corpus("boolq", tokenizer, max_tokens=args.tokens, context=256, workspace=home)
        common = [args.model, str(home), str(corpus.path), folder, args.hooks]
        (Path(folder) / "corpora").symlink_to(home / "corpora")
        said, took = child("estimate", *common), child("harvest", *common)
        took["disk_bytes"] = sum(
            p.stat().st_size for p in Path(folder).glob("activations/*/acts/**/*") if p.is_file()
        )
    keys = ("disk_bytes", "memory_growth_bytes", "seconds")
    out = {f"{k}_said_over_took": round(said[k] / took[k], 3) for k in keys}
    out |= {"tokens": args.tokens} | {f"{k}_took": round(took[k], 1) for k in keys}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
