"""The tables that show results: which rows and columns a file of results gets, by the module that wrote it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from interp_models.report.text import markdown
from studies.trainings import TRAININGS

_MEAN = ", mean of "
_LOW, _HIGH = ", lower end of 95 %", ", upper end of 95 %"
Values = Mapping[str, float]
"""The values of a file of results by name."""


def decimal(value: float, digits: int = 1) -> str:
    """A number with a minus sign, and zero without a sign.

    >>> decimal(-0.66), decimal(-0.04), decimal(84.56)
    ('−0.7', '0.0', '84.6')
    """
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def tables_of(results: Mapping[str, Any]) -> list[str]:
    """The tables of a file of results.

    Raises:
        ValueError: if a run has a measure twice.
    """
    if "checks" in results:
        return of_gpu(results)
    module = re.search(r"-m (?:benchmarks|studies)\.(\w+)", results["command"])
    values = {row["what"]: row["value"] for row in results["values"]}
    if module is not None and module[1] == "prototype_stages":
        return of_stages(values)
    if module is not None and module[1] == "prototype_interruptions":
        return [of_kills(values)]
    if module is not None and module[1] == "trained" and (models := _models(values)):
        return [*([of_models(results)] if len(models) > 1 else []), *others(results["values"])]
    return of_rows(results)


def of_rows(results: Mapping[str, Any]) -> list[str]:
    """Tables of timings, of memory, of values named `RUN: MEASURE`, and of other values."""
    parts = []
    if results["timings"]:
        head = ["work", "the floor counts", "passes per image", "time ÷ floor", "quartiles", "FLOPs ÷ floor"]
        parts.append(markdown(head, [_timing(row) for row in results["timings"]]))
    if results["memory"]:
        rows = [[row["what"], row["amount"], f"{row['mib']:.0f}"] for row in results["memory"]]
        parts.append(markdown(["work", "amount", "growth of peak memory, MiB"], rows))
    of_runs = [row for row in results["values"] if ": " in row["what"]]
    return parts + pivoted(of_runs) + others(results["values"])


def others(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of the values that are of no run; no table without such values."""
    rows = [[row["what"], f"{row['value']:.3g}", row["unit"]] for row in values if ": " not in row["what"]]
    return [markdown(["what", "value", "unit"], rows)] if rows else []


def pivoted(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of values named `RUN: MEASURE`, with the longer of the two lists as rows; no table without values.

    Raises:
        ValueError: if a run has a measure twice.
    """
    cells: dict[tuple[str, str], str] = {}
    for row in values:
        run, measure = row["what"].split(": ", 1)
        cell = (run, f"{measure}, {row['unit']}" if row["unit"] else measure)
        if cell in cells:
            raise ValueError(f"{row['what']} stands twice in the results")
        cells[cell] = f"{row['value']:.3g}"
    if not cells:
        return []
    runs = list(dict.fromkeys(run for run, _ in cells))
    measures = list(dict.fromkeys(measure for _, measure in cells))
    if len(measures) > len(runs):
        rows = [[measure, *(cells.get((run, measure), "") for run in runs)] for measure in measures]
        return [markdown(["measure", *runs], rows)]
    return [markdown(["run", *measures], [[run, *(cells.get((run, m), "") for m in measures)] for run in runs])]


def _models(values: Values) -> list[str]:
    return list(dict.fromkeys(what.split(_MEAN)[0] for what in values if _MEAN in what))


def of_models(results: Mapping[str, Any]) -> str:
    """Of `studies.trained`: one row per model; what was measured of each run is averaged over the seeds."""
    values = {row["what"]: row["value"] for row in results["values"]}
    models = _models(values)
    measures = {
        "pointing hits of own map": ("own map in the box, %", 1),
        "pointing hits of Grad-CAM": ("Grad-CAM in the box, %", 1),
        "pointing hits of centre Gaussian": ("centre Gaussian in the box, %", 1),
        "mean cosine between maps": ("cosine between maps", 2),
        "dead maps": ("dead maps", 0),
    }
    trained_here = "--records" in results["command"]  # `studies.trainings` says how
    head = ["model", *(["config and options"] if trained_here else []), "accuracy by seed, %", "mean, %", "interval"]
    head += [f"minus {models[0]}, points", "interval"]
    rows = []
    for model in models:
        runs = [what.split(": ")[0] for what in values if re.fullmatch(rf"{model}, seed \d+: test accuracy", what)]
        mean = f"{model}{_MEAN}{len(runs)} seed(s): accuracy"
        seeds = ", ".join(decimal(values[f"{run}: test accuracy"]) for run in runs)
        row = [model, *([_config(model)] if trained_here else []), seeds, *_with_interval(values, mean)]
        row += _with_interval(values, f"{mean} minus that of {models[0]}")
        for measure, (_, digits) in measures.items():
            found = [values[what] for run in runs if (what := f"{run}: {measure}") in values]
            row.append(decimal(sum(found) / len(found), digits) if found else "")
        rows.append(row)
    return _without_empty(head + [name for name, _ in measures.values()], rows)


def _config(experiment: str) -> str:
    file, *overrides = TRAININGS[experiment]
    last = dict(override.split("=", 1) for override in overrides)
    changes = [f"{key}={value}" for key, value in last.items()]
    return ", ".join([f"`{file.removeprefix('configs/')}`", *([f"`{' '.join(changes)}`"] if changes else [])])


def _with_interval(values: Values, what: str) -> list[str]:
    """A value and its interval; two empty cells without it."""
    if what not in values:
        return ["", ""]
    return [decimal(values[what]), f"{decimal(values[what + _LOW])} to {decimal(values[what + _HIGH])}"]


def _without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table without columns that have no value."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return markdown([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def of_stages(values: Values) -> list[str]:
    """Of `studies.prototype_stages`: one row per stage; of a tree also its finished runs, by kind of decision."""
    stages = list(dict.fromkeys(what.split(", ")[0] for what in values if ": acc" in what and ", " in what))
    stages = [stage for stage in stages if f"{stage}: accuracy" in values]
    runs = list(dict.fromkeys(what.split(", ", 1)[1].split(": ")[0] for what in values if what.endswith(": acc")))
    head = ["stage", "accuracy, %", "interval", "minus the stage before, points", "interval", "by seed, %"]
    head += ["prototypes", "leaves", "greedy minus soft, points", "interval"]
    head += ["close decisions, % of images", "greedy as soft there, %", "elsewhere, %"]
    rows = []
    for stage in stages:
        row = [stage, *_with_interval(values, f"{stage}: accuracy")]
        row += _with_interval(values, f"{stage}: accuracy minus that before")
        row.append(", ".join(decimal(values[f"{stage}, {run}: acc"]) for run in runs))
        for key in ("prototypes", "leaves"):
            found = [values[what] for run in runs if (what := f"{stage}, {run}: {key}") in values]
            row.append(", ".join(f"{count:.0f}" for count in (found if len(set(found)) > 1 else found[:1])))
        row += _with_interval(values, f"{stage}: acc_greedy minus soft")
        for key in (
            "images with a decision within 0.1 of 1/2",
            "fidelity_greedy of them",
            "fidelity_greedy of the others",
        ):
            row.append(decimal(values[f"{stage}: {key}"]) if f"{stage}: {key}" in values else "")
        rows.append(row)
    parts = [_without_empty(head, rows)]
    if any(what.endswith(": acc_greedy") for what in values):
        parts.append(_decisions(values, stages[-1], runs))
    if (what := "at the end: accuracy minus the reference's") in values:
        difference, interval = _with_interval(values, what)
        reference = next(what for what in values if what.endswith(": accuracy"))
        name = reference.split(": ")[0]
        parts.append(
            f"At the end minus `{name}` ({decimal(values[reference])} %): {difference} points, interval {interval}."
        )
    return parts


def _decisions(values: Values, stage: str, runs: Sequence[str]) -> str:
    head = [f"run, {stage[3:]}", "soft, %", "`sample_max`, %", "greedy, %"]
    head += ["`sample_max` as soft, %", "greedy as soft, %", "path of greedy, decisions", "likeliest leaf"]
    keys = {"acc": 1, "acc_sample_max": 1, "acc_greedy": 1, "fidelity_sample_max": 1, "fidelity_greedy": 1}
    keys |= {"path_length_greedy": 1, "likeliest_leaf": 2}
    cells = {(run, key): values.get(f"{stage}, {run}: {key}") for run in runs for key in keys}
    rows = [
        [run, *("" if (cell := cells[run, key]) is None else decimal(cell, digits) for key, digits in keys.items())]
        for run in runs
    ]
    return _without_empty(head, rows)


def of_kills(values: Values) -> str:
    """Of `benchmarks.prototype_interruptions`: how often each part was killed, and whether it ended the same."""
    found: dict[tuple[str, str], dict[str, bool]] = {}
    counts: dict[tuple[str, str], str] = {}
    for what, value in values.items():
        if match := re.fullmatch(r"(\w+), killed (\d+) times in ([\w ]+): (.*) as left alone", what):
            key = (match[1], match[3])
            counts[key] = match[2]
            found.setdefault(key, {})[match[4]] = bool(value)
    rows = []
    for (model, target), same in found.items():
        cells = ["equal" if same[what] else "different" for what in ("weights", "metrics.csv")]
        rows.append([model, target, counts[model, target], *cells])
    return markdown(["model", "killed in", "kills", "weights and buffers", "`metrics.csv`"], rows)


def of_gpu(results: Mapping[str, Any]) -> list[str]:
    """Of `benchmarks.gpu`: training steps, judging, passes and checks; without tables that have no row."""
    step = "training step of "
    ratios = {row["what"]: row["ratio"]["median"] for row in results["timings"]}
    memory = {row["what"]: f"{row['mib']:.0f}" for row in results["memory"]}
    values = [row for row in results["values"] if row["unit"] != "of its size apart"]
    steps = [row for row in values if row["what"].startswith(step)]
    parts = []
    if steps:
        rows = [
            [
                row["what"].removeprefix(step),
                f"{row['value']:.0f}",
                f"{ratios[row['what']]:.3f}" if row["what"] in ratios else "bare",
                memory.get(row["what"], ""),
            ]
            for row in steps
        ]
        head = ["training step", "images/s", "time ÷ bare backbone's, channels last", "peak memory, MiB"]
        parts.append(markdown(head, rows))
    judging = [row for row in results["timings"] if not row["what"].startswith(step)]
    if judging:
        rows = [[*_timing(row)[:5], memory.get(row["what"], "")] for row in judging]
        head = ["judging", "the floor counts", "passes per image", "time ÷ floor", "quartiles", "peak memory, MiB"]
        parts.append(markdown(head, rows))
    if rest := [row for row in values if row not in steps]:
        parts.append(markdown(["what", "value", "unit"], [[r["what"], f"{r['value']:.3g}", r["unit"]] for r in rest]))
    checks = results["checks"]
    if checks:
        rows = []
        for tolerance in sorted({check["tolerance"] for check in checks}):
            some = [check for check in checks if check["tolerance"] == tolerance]
            within = [check["apart"] for check in some if check["right"]]
            rows.append([f"{tolerance:g}", str(len(some)), str(len(within)), f"{max(within, default=0):.2g}"])
        parts.append(markdown(["tolerance of the checks", "checks", "within", "largest difference of these"], rows))
    if wrong := [check for check in checks if not check["right"]]:
        rows = [[check["what"], f"{check['apart']:.2g}", f"{check['tolerance']:g}"] for check in wrong]
        parts.append(markdown(["beyond the tolerance", "difference", "tolerance"], rows))
    if results["failures"]:
        parts.append(markdown(["failed", "error"], [[row["what"], row["error"]] for row in results["failures"]]))
    if results["left"]:
        parts.append(f"{len(results['left'])} items were not run: time was up.")
    return parts


def _timing(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]
    passes = "" if row["passes"] is None else f"{row['passes']:g}"
    shares = "" if row["flops"] is None else f"{row['flops']:.4f}"
    quartiles = f"{ratio['q1']:.3f} to {ratio['q3']:.3f}"
    return [row["what"], row["floor"], passes, f"{ratio['median']:.3f}", quartiles, shares]
