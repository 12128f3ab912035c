"""A training job as data: a YAML file is the truth, and `a.b=c` overrides change it.

saes:
  - {preset: topk, d_sae: 4608, k: 32}
train: {steps: 1500, batch_size: 2048, lr: 8.0e-4}
grid: {k: [16, 32], lr: [4.0e-4, 8.0e-4]}             # optional: app/sweep.py
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cache.errors import MissingDataError, UsageError
from saes.config import SAEConfig
from saes.presets import PRESETS
from saes.train_config import TrainConfig

FAST = "fast"
"""As a preset: TopK on FAST's data path. Beside another preset it is `data: fast` (docs/fast.md)."""
NAMES = (*PRESETS, FAST)
"""What `preset` may be."""


def read_job(path: Path | None) -> dict[str, Any]:
    """The YAML file as a dictionary; {} without one. Raises UsageError on anything that is not a mapping."""
    if path is None:
        return {}
    try:
        job = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise MissingDataError(f"no job file {path}: give the path of a YAML file") from e
    except IsADirectoryError as e:
        raise UsageError(f"{path} is a folder: give the path of a YAML file") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 text at byte {e.start}: give the path of a YAML file") from e
    except (yaml.YAMLError, ValueError) as e:  # ValueError: of a date that is none
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(job, dict):
        raise UsageError(f"{path} must hold a mapping with the keys saes and train")
    if not isinstance(job.get("train") or {}, dict):
        raise UsageError(f"{path}: train must be a mapping, for example train: {{steps: 1500}}")
    _check_keys(job, str(path))
    return job


def _check_keys(value: Any, where: str) -> None:
    """Refuse numbers and truth values (YAML 1.1 reads on and no as such) in the place of a field's name."""
    for item in value if isinstance(value, list) else []:
        _check_keys(item, where)
    for key, item in value.items() if isinstance(value, dict) else []:
        if not isinstance(key, str):
            raise UsageError(f"{where}: {key!r} is not the name of a field")
        _check_keys(item, where)


def override(job: dict[str, Any], assignments: list[str]) -> None:
    """Apply `a.b=value` to the job in place; a number in the path is a place in a list, values are YAML."""
    for text in assignments:
        path, eq, value = text.partition("=")
        if not eq or not path:
            raise UsageError(f"--set takes name=value, for example train.steps=500, got {text!r}")
        keys, node = path.split("."), job
        for key in keys[:-1]:
            node = _child(node, key, path)
        if isinstance(node, list):
            raise UsageError(f"--set {path}: name a field of the list's item, for example saes.0.k=64")
        if not isinstance(node, dict):
            raise UsageError(f"--set {path}: {keys[-2]} is a value, it has no fields")
        try:
            node[keys[-1]] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as e:
            raise UsageError(f"--set {path}: {value!r} is not a YAML value") from e
        _check_keys(node[keys[-1]], f"--set {path}")


def _child(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise UsageError(f"--set {path}: the list has items 0 to {len(node) - 1}")
        return node[int(key)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {path}: there is nothing below {node!r}")
    if key == "saes" and key not in node:
        raise UsageError(f"--set {path}: the job names no SAE yet: give --d-sae or a YAML file")
    return node.setdefault(key, {})


def resolve(job: dict[str, Any]) -> tuple[list[SAEConfig], TrainConfig]:
    """Configs of the job. Raises UsageError on unknown keys, presets or fields."""
    unknown = sorted(set(job) - {"saes", "train"})
    if unknown:
        raise UsageError(f"a training job has the keys saes, train and grid, not {', '.join(unknown)}")
    entries, schedule = job.get("saes") or [], job.get("train") or {}
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UsageError(
            "saes must be a list of mappings, for example saes: [{preset: topk, d_sae: 4608, k: 32}]"
        )
    if not isinstance(schedule, dict):
        raise UsageError("train must be a mapping, for example train: {steps: 1500}")
    if not entries:
        raise UsageError("the job names no SAE: give --d-sae and --k, or a `saes:` list in the YAML file")
    if any(e.get("preset") == FAST for e in entries):
        schedule = {"skip": None} | schedule  # it learns from all rows
    return [_sae(dict(e)) for e in entries], TrainConfig.from_dict(_typed(TrainConfig, schedule))


def _sae(entry: dict[str, Any]) -> SAEConfig:
    preset = entry.pop("preset", "topk")
    if preset == FAST:
        preset, entry = "topk", {"data": "fast"} | entry
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}: there are {', '.join(NAMES)}")
    # a preset is its activation, except that of GBA, which has two forms
    known = set(SAEConfig.__dataclass_fields__) - ({"activation"} if preset != "gba" else set())
    unknown = sorted(set(entry) - known)
    if unknown or "d_sae" not in entry:
        problem = f"has no field {', '.join(unknown)}" if unknown else "needs d_sae, the number of latents"
        raise UsageError(f"preset {preset} {problem}; fields are {', '.join(sorted(known))}")
    return PRESETS[preset](**_typed(SAEConfig, entry))


def _typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that the fields have, as YAML means them. Refuses other types."""
    out = {}
    for key, value in values.items():
        kind = str(cls.__annotations__.get(key, ""))
        if kind.startswith("Literal") and isinstance(value, bool):
            value = "on" if value else "off"  # YAML 1.1 reads the words on and off as truth values
        if kind.startswith("tuple") and isinstance(value, list):
            value = [_number(v, whole=True) for v in value]
        if value is not None or "None" not in kind:
            if kind.startswith("str") and not isinstance(value, str):
                raise UsageError(f"{key} must be text, got {value!r}")
            if kind.startswith(("int", "float")):
                whole = kind.startswith("int")
                value = _number(value, whole=whole)
                if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                    what = "a whole number" if whole else "a number"
                    raise UsageError(f"{key} must be {what}, got {value!r}")
        out[key] = value
    return out


def _number(value: Any, *, whole: bool) -> Any:
    """YAML 1.1 reads 8e-4 as text, and 1e2 steps are 100; what is no number comes back as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value
