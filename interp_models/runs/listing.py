"""A table of the runs below a folder, made from their files; no model is loaded."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from interp_models.config.loading import load_yaml
from interp_models.core.errors import InputError
from interp_models.training.tasks import MEASURES

UNLIKE = {"out"}
"""Config keys that differ between any two runs; the table leaves them out."""


def run_list(folder: Path) -> str:
    """A text table of the runs below a folder.

    Columns: the config keys that differ between the runs, validation and test accuracy in percent, and the date of the
    evaluation. Lines for unreadable configs follow the table.

    Raises:
        InputError: if there is no run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; write --list-runs FOLDER")
    runs = sorted(path.parent for path in folder.rglob("config.yaml"))
    configs: dict[Path, dict[str, str]] = {}
    broken = []
    for run in runs:
        try:
            configs[run] = {
                key: text for key, text in _flat(load_yaml(run / "config.yaml")).items() if key not in UNLIKE
            }
        except InputError as error:
            broken.append(str(error))
    if not runs:
        raise InputError(f"{folder} holds no run: no folder below it has a config.yaml")
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differing = [key for key in keys if len({config.get(key) for config in configs.values()}) > 1]
    rows = [
        {"run": str(run.relative_to(folder)), **{key: config.get(key, "-") for key in differing}, **_outcome(run)}
        for run, config in configs.items()
    ]
    table = pd.DataFrame(rows).to_string(index=False) if rows else ""
    return "\n".join([table, *(f"broken: {line}" for line in broken)]).strip("\n")


def _flat(node: Any, key: str = "") -> dict[str, str]:
    """All values of a config as text, with their keys as written on the command line, such as `phases[0].epochs`."""
    if isinstance(node, dict) and node:
        parts = [_flat(value, f"{key}.{name}" if key else str(name)) for name, value in node.items()]
    elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
        parts = [_flat(value, f"{key}[{number}]") for number, value in enumerate(node)]
    else:
        return {key: "null" if node is None else str(node)}
    return {name: text for part in parts for name, text in part.items()}


def _outcome(run: Path) -> dict[str, str]:
    """Accuracies in percent (`-` if unknown), or mean average precisions for several labels, and the date of the
    evaluation (`no` if there is none)."""
    metrics = _json(run / "metrics.json")
    results = run / "evaluation" / "results.json"
    val = next((metrics[key] for key in _keys("val") if key in metrics), _best(run, metrics.get("epoch")))
    test = next((metrics[key] for key in _keys("test") if key in metrics), None)
    date = datetime.fromtimestamp(results.stat().st_mtime).strftime("%Y-%m-%d %H:%M") if results.is_file() else "no"
    return {"val %": _percent(val), "test %": _percent(test) if metrics else "unfinished", "evaluated": date}


def _keys(stage: str) -> list[str]:
    """The keys of a stage (`val` or `test`) that tell how good a model is, for each task."""
    return [f"{stage}/{measure.key}" for measure in MEASURES.values()]


def _percent(value: Any) -> str:
    known = isinstance(value, int | float) and 0 <= value <= 1
    return f"{100 * value:.2f}" if known else "-"


def _json(path: Path) -> dict[str, Any]:
    try:
        node = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return node if isinstance(node, dict) else {}


def _best(run: Path, epoch: int | None) -> float | None:
    """Validation accuracy, or mean average precision, of `epoch`, or of the best epoch so far if it is None, read from
    `metrics.csv`."""
    try:
        table = pd.read_csv(run / "metrics.csv")
        key = next(key for key in _keys("val") if key in table)
        table = table[["epoch", key]].dropna()
    except (OSError, ValueError, KeyError, StopIteration):
        return None
    if epoch is not None:
        table = table[table["epoch"] == epoch]
    values = pd.to_numeric(table[key], errors="coerce").dropna()
    return float(values.max()) if len(values) else None
