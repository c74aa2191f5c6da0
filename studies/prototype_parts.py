"""What the prototypes of evaluated runs show: the means of the prototype metrics, a row per run.

python -m studies.prototype_parts --runs RUN [RUN ...] [--name NAME]

The runs were evaluated with `prototype_metrics`; nothing is computed here.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from benchmarks.tables import show
from interp_models.runs.folders import run_name


def found(run: Path) -> list[Row]:
    """The means of a run, shares in percent. What is undefined for all prototypes is left out.

    Raises:
        SystemExit: if the run has no prototype metrics.
    """
    path = run / "evaluation" / "prototypes.json"
    if not path.is_file():
        raise SystemExit(f"{run} has no prototype metrics; evaluate it with prototype_metrics=[...]")
    rows: list[Row] = []
    for row in json.loads(path.read_text())["rows"]:
        if row["metric"] == "used":
            rows.append(Value(f"{run_name(run)}: prototypes in use", round(row["mean"] * row["n"]), ""))
        elif row["mean"] is not None:
            share = row["percent"]
            rows.append(Value(f"{run_name(run)}: {row['metric']}", row["mean"] * (100 if share else 1), "%" * share))
    return sorted(rows, key=lambda row: not row.what.endswith("in use"))


def main(argv: Sequence[str] | None = None) -> Path:
    """Collect and write the results."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of evaluated runs")
    p.add_argument("--name", default="prototype_parts", help="name of the file of results")
    args = p.parse_args(argv)
    if not args.name.isidentifier() or len(set(map(run_name, args.runs))) < len(args.runs):
        p.error("--name must be a word, and no two runs may have the same name")
    args.command = f"python -m studies.prototype_parts --name {args.name} --runs {' '.join(map(run_name, args.runs))}"
    rows = [row for run in args.runs for row in found(run)]
    return write(args.name, args, "all test images of the runs", rows)


if __name__ == "__main__":
    print(show(main()))
