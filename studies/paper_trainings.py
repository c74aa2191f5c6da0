"""Trains the models of a published table of accuracies, and prints our accuracy beside the published one.

python -m studies.paper_trainings configs/paper/dpnet_table2.yaml cub=PATH mit67=PATH [--seed 1]

The yaml lists trainings: a shipped config, changes, the data set, and the published accuracy. Finished trainings are
not repeated, and interrupted ones are resumed. Data sets without a path are left out. The table is written to
`<folder>/<name of the yaml>.md`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import STUDIES, plain_parser
from interp_models.config.shipped import config_path
from interp_models.core.files import short
from interp_models.report.published import Beside

HERE = STUDIES.parents[1]


def trained(one: Mapping[str, Any], root: str, folder: Path, seed: int, more: Sequence[str]) -> float:
    """The test accuracy of a training in percent; it is trained, or resumed, if it is not finished.

    Raises:
        SystemExit: if the training fails.
    """
    out = folder / short("".join(letter if letter.isalnum() else "_" for letter in one["what"])) / str(seed)
    if not (out / "metrics.json").is_file():
        words = [
            str(config_path(one["config"])),
            f"data.dataset={{name: {one['dataset']}, root: {root}}}",
            *one.get("changes", []),
            f"seed={seed}",
            f"out={out}",
            *more,
        ]
        if (out / "checkpoints" / "last.ckpt").is_file():
            words = [f"resume={out}"]
        if subprocess.run([sys.executable, str(HERE / "train.py"), *words]).returncode:
            raise SystemExit(f"{one['what']}: the training failed")
    return 100 * float(json.loads((out / "metrics.json").read_text())["test/acc"])


def table_of(listed: Mapping[str, Any], ours: Mapping[str, float]) -> str:
    """The table in Markdown."""
    lines = []
    for one in listed["trainings"]:
        value = f"{ours[one['what']]:.1f}" if one["what"] in ours else "–"
        lines.append([one["what"], value, f"{one['published']:.1f}"])
    return str(Beside(["", "ours", "published"], lines, listed["source"]))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and write the table."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("table", type=Path, help="yaml of the table")
    p.add_argument("roots", nargs="+", metavar="DATASET=PATH", help="folder of each data set")
    p.add_argument("--folder", type=Path, default=Path("runs/paper"), help="folder of the runs")
    p.add_argument("--more", nargs="*", default=[], help="more overrides for all trainings, key=value")
    args = p.parse_args(argv)
    if reserved := [one for one in args.more if one.startswith(("seed=", "out="))]:
        raise SystemExit(f"--more {reserved[0]}: --seed and --folder say this")
    listed = yaml.safe_load(config_path(str(args.table)).read_text("utf-8"))
    roots = dict(one.partition("=")[::2] for one in args.roots)
    known = {one["dataset"] for one in listed["trainings"]}
    if unknown := set(roots) - known:
        raise SystemExit(f"{sorted(unknown)[0]} is no data set of {args.table}; it has {', '.join(sorted(known))}")
    ours = {
        one["what"]: trained(one, roots[one["dataset"]], args.folder / args.table.stem, args.seed, args.more)
        for one in listed["trainings"]
        if one["dataset"] in roots
    }
    path: Path = args.folder / f"{args.table.stem}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table_of(listed, ours) + "\n", "utf-8")
    print(path.read_text("utf-8"))
    return path


if __name__ == "__main__":
    print(main())
