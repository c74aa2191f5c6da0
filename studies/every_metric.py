"""What every metric says of every explainer: tables of finished evaluations.

For each metric, how many explainers a paired test tells apart from the control, where the controls stand, and how far
the perturbed images lie from the clean ones; for each explainer, its mean rank over metrics and its costs. Below them,
how far maps differ that are equal before a mean and a linear layer.

    python evaluate.py RUN config=configs/eval/every_metric.yaml
    python -m studies.every_metric RUN/evaluation
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from interp_models.evaluation.statistics import LEVEL
from interp_models.explainers.controls import is_control
from interp_models.metrics.perturbation import min_max
from interp_models.report.text import markdown

Row = Mapping[str, Any]
SHOWN = 8
"""At most so many maps that share the first rank are named."""


def of_metric(rows: Sequence[Row]) -> list[str]:
    """Cells about one metric, from its rows of all explainers."""
    controls = [row for row in rows if is_control(row["options"]["name"])]
    methods = [row for row in rows if not is_control(row["options"]["name"])]
    apart = [row for row in methods if row["p"] is not None and row["p"] < LEVEL]
    better = sum(row["superiority"] > 0.5 for row in apart)
    first = [row["explainer"] for row in rows if row["rank"] == 1]
    names = ", ".join(f"`{name}`" for name in first) if len(first) <= SHOWN else f"{len(first)} maps"
    places = ", ".join(str(row["rank"] or "–") for row in controls)
    far = [row["distance"] for row in methods if row["distance"] is not None]
    arrow = "↑" if rows[0]["higher_is_better"] else "↓"
    return [
        f"`{rows[0]['metric']}` {arrow}", f"{better} / {len(apart) - better} / {len(methods) - len(apart)}", names,
        places, f"{median(far):.2f}" if far else "–",
    ]  # fmt: skip


def of_explainer(name: str, results: Mapping[str, Any]) -> list[str]:
    """Cells about one explainer."""
    mean, std = results["mean_ranks"][name]
    costs = results["costs"].get(name, {})
    passes, seconds = costs.get("passes"), costs.get("seconds")
    return [
        f"`{name}`", f"{mean:.1f} ± {std:.1f}", "–" if passes is None else f"{passes:.0f}",
        "–" if seconds is None else f"{seconds:.2f}",
    ]  # fmt: skip


def tables(results: Mapping[str, Any]) -> str:
    """Both tables of one evaluation, from its `results.json`."""
    by_metric: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_metric.setdefault(row["metric"], []).append(row)
    control = next((row["control"] for row in results["rows"] if row["control"]), None)
    first = next(iter(by_metric.values()), [])
    names = ", ".join(f"`{row['explainer']}`" for row in first if is_control(row["options"]["name"]))
    head = ["Metric", f"Better / worse than `{control}` / not told apart", "First", f"Ranks of {names}", "Distance"]
    ranked = sorted(results["mean_ranks"], key=lambda name: float(results["mean_ranks"][name][0]))
    return "\n\n".join(
        [
            markdown(head, [of_metric(rows) for rows in by_metric.values()]),
            markdown(["Map", "Mean rank", "Passes", "Seconds"], [of_explainer(name, results) for name in ranked]),
        ]
    )


def identities(maps: Path) -> list[str]:
    """How far the maps in a folder are from identities of networks that end in a mean and a linear layer: XGrad-CAM is
    Grad-CAM, and the guidance map is the square of ReLU(Grad-CAM), scaled to [0, 1]."""
    names = ("gradcam", "xgradcam", "guidancecam")
    if not all((maps / f"{name}.npy").is_file() for name in names):
        return []
    gradcam, xgradcam, guidance = (torch.from_numpy(np.load(maps / f"{name}.npy")) for name in names)
    apart = float((gradcam - xgradcam).abs().max() / gradcam.abs().max())
    squared = float((min_max(gradcam.relu().square()) - min_max(guidance)).abs().max())
    return [
        f"XGrad-CAM is Grad-CAM to {apart:.1e}, the guidance map ReLU(Grad-CAM)² to {squared:.1e} (n = {len(gradcam)})"
    ]


def main(argv: Sequence[str] | None = None) -> str:
    """The tables of evaluations in Markdown."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="+", type=Path, help="folders of finished evaluations")
    args = p.parse_args(argv)
    found: list[str] = []
    for folder in args.folders:
        found += [tables(json.loads((folder / "results.json").read_text())), *identities(folder / "maps")]
    return "\n\n".join(found)


if __name__ == "__main__":
    print(main())
