"""A picture of a run's prototypes that show one part most and least consistently, and their nearest images.

python -m studies.prototype_pictures RUN [RUN ...] --picture FILE [--count 3]

The runs are evaluated with the prototype metric `purity`. A row is the sheet of one prototype: its patch, and its most
similar training and test images. Prototypes are ordered by purity; the upper rows of a run have the highest, the
lower rows the lowest. Prototypes of equal purity keep their numbers' order.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from interp_models.runs.folders import run_name


def extremes(run: Path, count: int) -> pd.DataFrame:
    """The prototypes of a run with the highest and the lowest purity, best first, with their sheets in `sheet`.

    Raises:
        SystemExit: if the run has no prototypes with a purity.
    """
    table = run / "evaluation" / "prototypes.parquet"
    if not table.is_file():
        raise SystemExit(f"{run} has no evaluated prototypes; evaluate it with prototype_metrics=[purity]")
    rows = pd.read_parquet(table)
    if "purity" not in rows:
        raise SystemExit(f"{run}: its evaluation has no purity; evaluate it with prototype_metrics=[purity]")
    rows = rows.dropna(subset=["purity"]).sort_values("purity", ascending=False, kind="stable")
    sheets = {int(path.stem): path for path in (run / "evaluation" / "prototypes").glob("*/*.jpg")}
    rows = rows.assign(sheet=rows["prototype"].map(sheets)).dropna(subset=["sheet"])
    if rows.empty:
        raise SystemExit(f"{run} has no sheet of a prototype with a purity")
    return rows if len(rows) <= 2 * count else pd.concat([rows.head(count), rows.tail(count)])


def draw(runs: Sequence[Path], count: int, path: Path) -> None:
    """Draw the sheets of all runs below each other."""
    found = [(run, extremes(run, count)) for run in runs]
    total = sum(len(rows) for _, rows in found)
    figure = Figure(figsize=(10, 1.12 * total), layout="constrained")
    axes = iter(figure.subplots(total, squeeze=False)[:, 0])
    for run, rows in found:
        for row in rows.to_dict("records"):
            ax = next(axes)
            ax.imshow(Image.open(row["sheet"]))
            ax.set_axis_off()
            title = f"{run_name(run)}, prototype {row['prototype']}: purity {100 * row['purity']:.0f} %"
            ax.set_title(title, fontsize=8, loc="left", pad=2)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85})


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw the picture."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", help="folders of evaluated runs")
    p.add_argument("--picture", type=Path, required=True, help="file to write")
    p.add_argument("--count", type=int, default=3, help="prototypes of the highest and of the lowest purity per run")
    args = p.parse_args(argv)
    if args.count < 1 or args.picture.suffix not in (".jpg", ".png") or not args.picture.parent.is_dir():
        p.error("--count must be at least 1, and --picture a .jpg or .png file in a folder that exists")
    draw(args.runs, args.count, args.picture)
    picture: Path = args.picture
    return picture


if __name__ == "__main__":
    print(main())
