"""Trains and records the runs that docs/results compares, if they have no record yet.

python -m studies.trainings --root FOLDER                      everything, seeds 0 to 2
python -m studies.trainings --root FOLDER --names cub_br_npa_lite0 bcnn_block --seeds 0
python -m studies.trainings --list

An interrupted training is resumed. Several calls may run at once if their names or seeds differ.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import STUDIES, plain_parser
from studies import trained

HERE = STUDIES.parents[1]
DPNET = "configs/cub/dpnet_lite0.yaml"
COMPLEMENTARY, COVERING, SPECIFIC = (f"model.{name}=0" for name in ("complementary", "covering", "specific"))
WSDAN = "configs/cub/bcnn_wsdan_lite0.yaml"
BCNN, CNN = "configs/cub/bcnn_lite0.yaml", "configs/cub/cnn_lite0.yaml"
PROTOPNET, PROTOTREE = "configs/cub/protopnet_lite0.yaml", "configs/cub/prototree_lite0.yaml"
ALONE = ["model.name=wsdan", "model.normalise=false", "model.centre=0", "model.crop_drop=false"]
"""Options of WS-DAN without its recipe: this is B-CNN."""

ON_TRUNK = ("bcnn", "br_npa", "dpnet", "protopnet", "prototree")
"""Models that stand on the trunk of `cub_cnn_dinov2` of the same seed."""

TRAININGS: Mapping[str, Sequence[str]] = {
    "cub_cnn_lite0": [CNN],
    "cnn_crops": [CNN, "data.crop_to_box=true"],
    "cub_bcnn_lite0": [BCNN],
    "cub_br_npa_lite0": ["configs/cub/br_npa_lite0.yaml"],
    "cub_br_npa_lite0_high": ["configs/cub/br_npa_lite0_high.yaml"],
    "protopnet_crops": [PROTOPNET],
    "protopnet_full": [PROTOPNET, "data.crop_to_box=false"],
    "prototree_crops": [PROTOTREE],
    "prototree_full": [PROTOTREE, "data.crop_to_box=false"],
    "bcnn_block": [BCNN, "model.block=true"],
    "bcnn_normalise": [BCNN, *ALONE, "model.normalise=true"],
    "bcnn_centre": [BCNN, *ALONE, "model.normalise=true", "model.centre=1.0"],
    "bcnn_crop_drop": [BCNN, *ALONE, "model.crop_drop=true"],
    "bcnn_counterfactual": [BCNN, *ALONE, "model.name=cal", "model.counterfactual=1.0"],
    "cub_bcnn_wsdan_lite0": [WSDAN],
    "bcnn_cal": [WSDAN, "model.name=cal"],
    "dpnet_global": ["configs/cub/dpnet_global_lite0.yaml"],
    "dpnet_none": [DPNET, COMPLEMENTARY, COVERING, SPECIFIC],
    "dpnet_complementary": [DPNET, COVERING, SPECIFIC],
    "dpnet_covering": [DPNET, COMPLEMENTARY, SPECIFIC],
    "dpnet_specific": [DPNET, COMPLEMENTARY, COVERING],
    "dpnet_complementary_covering": [DPNET, SPECIFIC],
    "dpnet_complementary_specific": [DPNET, COVERING],
    "dpnet_covering_specific": [DPNET, COMPLEMENTARY],
    "dpnet_all": [DPNET],
    "cub_vit_cls_dinov2": ["configs/cub/vit_cls_dinov2.yaml", "trainer.precision=bf16-mixed"],
    "cub_cnn_dinov2": ["configs/cub/cnn_dinov2.yaml"],
    **{f"cub_{name}_dinov2": [f"configs/cub/{name}_dinov2.yaml"] for name in ON_TRUNK},
}
"""Config and overrides by experiment. DP-Net's config has all constraints; the overrides leave some out."""
BEFORE: Mapping[str, tuple[str, str]] = {
    "cub_br_npa_lite0_high": ("cub_br_npa_lite0", "distillation.teacher={}"),
    **{f"cub_{name}_dinov2": ("cub_cnn_dinov2", "model.weights={}/checkpoints/last.ckpt") for name in ON_TRUNK},
}
"""By experiment, the one that it needs, of the same seed, and the override that names its run folder."""


def overrides(name: str, seed: int, *, root: str, vit: str) -> list[str]:
    """The overrides of a training's config, except for that of `BEFORE`."""
    changes = [*TRAININGS[name][1:], f"experiment={name}", f"seed={seed}"]
    changes += [f"data.dataset.root={root}", "data.val_fraction=0", "logger.wandb=disabled"]
    return changes + ([f"model.weights={vit}"] if name in ("cub_vit_cls_dinov2", "cub_cnn_dinov2") else [])


def finish(out: Path, words: Sequence[str], what: str, threads: int | None = None) -> None:
    """Train a run into a folder, or resume it, unless it is finished.

    Args:
        out: the run folder.
        words: config and overrides.
        what: name of the training.
        threads: threads of torch; None leaves them to torch.

    Raises:
        SystemExit: if the training fails.
    """
    if (out / "metrics.json").is_file():
        return
    begun = (out / "config.yaml").is_file()  # also before the first checkpoint
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, str(HERE / "train.py"), *([f"resume={out}"] if begun else [*words, f"out={out}"])]
    if subprocess.run(command, env=env).returncode:
        raise SystemExit(f"{what}: the training failed")


def run(name: str, seed: int, folder: Path, more: Sequence[str], *, root: str, vit: str) -> Path:
    """The folder of a finished run, `<folder>/<name>/<seed>`; it is trained or resumed if it is not finished.

    Raises:
        SystemExit: if the training fails.
    """
    out = folder / name / str(seed)
    words = [str(HERE / TRAININGS[name][0]), *overrides(name, seed, root=root, vit=vit), *more]
    if name in BEFORE and not (out / "metrics.json").is_file():
        needed, change = BEFORE[name]
        words.append(change.format(run(needed, seed, folder, more, root=root, vit=vit)))
    finish(out, words, f"{name}, seed {seed}")
    return out


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Train and record; returns the new records."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument(
        "--names",
        nargs="+",
        choices=TRAININGS,
        default=list(TRAININGS),
        metavar="NAME",
        help="experiments; default: all",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    p.add_argument("--root", default="data", help="folder of CUB-200-2011")
    p.add_argument("--vit", default="timm", help="weights of the vision transformer: timm or a file")
    p.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the runs")
    p.add_argument("--more", nargs="*", default=[], help="more overrides for all trainings, key=value")
    p.add_argument("--list", action="store_true", help="print which runs have records, and train nothing")
    args = p.parse_args(argv)
    wanted = [(name, seed) for seed in args.seeds for name in args.names]
    missing = [pair for pair in wanted if not (args.out / trained.FOLDER / "{}-{}.json".format(*pair)).is_file()]
    if args.list:
        for pair in wanted:
            print("missing " if pair in missing else "recorded", "{}-{}".format(*pair))
        return []
    records = []
    for name, seed in missing:
        folder = run(name, seed, args.folder, args.more, root=args.root, vit=args.vit)
        records += trained.main(["--runs", str(folder), "--threads", str(args.threads), "--out", str(args.out)])
    return records


if __name__ == "__main__":
    print(*main(), sep="\n")
