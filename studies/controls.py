"""How many explainers of an evaluation beat each control, by each metric; and how alike the metrics rank explainers.

python evaluate.py RUN config=configs/eval/posthoc.yaml
python -m studies.controls --run RUN

An explainer beats a control by a metric if the 95 % interval of the mean difference per image, by the paired bootstrap
over the images, lies on the better side of 0. Ranks are compared by Spearman's correlation of the explainers' means,
after the sign of metrics whose lower values are better is changed. Both read `RUN/evaluation/per_image.parquet`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from benchmarks.tables import show
from interp_models.explainers.controls import is_control
from interp_models.runs.folders import run_name
from studies.trained import RESAMPLES


def values(run: Path) -> tuple[pd.DataFrame, list[str]]:
    """Values of an evaluated run, higher is better: (explainer, metric) × image; and the labels of its controls.

    Raises:
        SystemExit: if the run was not evaluated.
    """
    path = run / "evaluation/per_image.parquet"
    if not path.is_file():
        raise SystemExit(f"{run}: not evaluated, {path.relative_to(run)} is missing")
    table = pd.read_parquet(path)
    table["value"] = table["value"].where(table["higher_is_better"], -table["value"]).astype(float)
    options = table.drop_duplicates("explainer").set_index("explainer")["options"].map(json.loads)
    names = [label for label, each in options.items() if is_control(each["name"])]
    return table.pivot(index=["explainer", "metric"], columns="index", values="value"), [str(name) for name in names]


def intervals(differences: NDArray[np.float64], seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95 % bootstrap intervals of the means of rows (k, n), all by the same resamples; NaN is left out.

    >>> low, high = intervals(np.array([[1.0, 1.0, 1.0], [-2.0, np.nan, -2.0]]))
    >>> low.tolist(), high.tolist()
    ([1.0, -2.0], [1.0, -2.0])
    """
    n = differences.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=n).astype(float)
    defined = ~np.isnan(differences)
    with np.errstate(invalid="ignore"):  # a resample may hold no image with a value
        means = (counts @ np.where(defined, differences, 0).T) / (counts @ defined.T)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


def measure(run: Path, seed: int) -> list[Row]:
    """Explainers that are better and worse than each control by each metric, then the correlations of ranks.

    Raises:
        SystemExit: if the run was not evaluated, or without controls.
    """
    table, names = values(run)
    if not names:
        raise SystemExit(f"{run}: evaluated without controls")
    metrics = [str(metric) for metric in table.index.unique("metric")]
    explainers = [name for name in table.index.unique("explainer") if name not in names]
    rows: list[Row] = [Value("explainers", len(explainers), "")]
    for control in names:
        for metric in metrics:
            some = table.xs(metric, level="metric")
            low, high = intervals(some.loc[explainers].to_numpy() - some.loc[control].to_numpy(), seed)
            rows.append(Value(f"{control}: {metric}, better", int((low > 0).sum()), ""))
            rows.append(Value(f"{control}: {metric}, worse", int((high < 0).sum()), ""))
    ranks = table.mean(axis=1).unstack("metric").loc[explainers].corr("spearman")
    pairs = [(one, other) for number, one in enumerate(metrics) for other in metrics[:number]]
    defined = [(one, other) for one, other in pairs if not np.isnan(ranks[one][other])]
    rows += [Value(f"rank correlation of {one} and {other}", float(ranks[one][other]), "") for one, other in defined]
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `controls.json`."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--run", type=Path, required=True, help="an evaluated run")
    args = p.parse_args(argv)
    args.command = f"python -m studies.controls --run {run_name(args.run)}"
    return write("controls", args, "images of the evaluation", measure(args.run, args.seed))


if __name__ == "__main__":
    print(show(main()))
