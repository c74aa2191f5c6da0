"""What limits the accuracy of ProtoTree and ProtoPNet: trials on validation images, one change each.

python -m studies.prototype_recipes --root FOLDER --cache FOLDER [--names NAME ...] [--seeds 0 1 2]
python -m studies.prototype_recipes --list

Each trial trains on four fifths of the training images (first 25 classes of CUB, crops) and is judged on the others; no
test image decides. Trials of frozen trunks read cached features of 12 augmented copies, or of 4. `tree_config` and
`net_pushed` are the configs as they are, with their last actions. A finished trial is a record in `results/recipes/`,
so an interrupted call goes on. The table of all records is printed at the end.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from benchmarks.harness import STUDIES, plain_parser, provenance
from interp_models.config.loading import as_dict, configured
from interp_models.core.files import write_json
from interp_models.report.text import markdown
from interp_models.runs.building import resolve
from interp_models.runs.config import TrainConfig
from studies.trainings import HERE, finish

FOLDER = "recipes"
COPIES = 12
OF_TREES = {"greedy": "acc_greedy", "leaves": "leaves"}
"""Key in the metrics by key in the record."""
HELD = "eval_modules: [backbone]"


def frozen(*, epochs: int = 40, add_on: float = 1e-3, prototypes: float = 1e-1, select: str = "last") -> str:
    """A phase on cached features."""
    lrs = f"{{add_on: {add_on}, prototypes: {prototypes}}}"
    return f"{{name: freeze, epochs: {epochs}, schedule: cosine, lrs: {lrs}, {HELD}, select: {select}}}"


def joint(
    *, epochs: int = 20, backbone: float = 2e-4, add_on: float = 1e-3, prototypes: float = 3e-2, held: bool = True
) -> str:
    """A phase that trains everything, on images."""
    lrs = f"{{backbone: {backbone}, add_on: {add_on}, prototypes: {prototypes}}}"
    modes = f", {HELD}" if held else ""
    return f"{{name: all, epochs: {epochs}, schedule: cosine, warmup: 0.1, lrs: {lrs}{modes}, select: last}}"


def ending(phase: str, actions: str) -> str:
    """The phase, with actions at its end."""
    return f"{phase[:-1]}, on_end: [{actions}]}}"


def pushed(phase: str) -> str:
    """The phase of a ProtoPNet that ends with the push and the last layer."""
    return ending(phase, "push, fit_last_layer")


L2, SLOW = frozen(add_on=3e-3, prototypes=3e-2), frozen(prototypes=1e-2)


def tree(*changes: str, phases: Sequence[str] = (frozen(),)) -> list[str]:
    """Overrides of a trial with ProtoTree of depth 6."""
    optimizer = "optimizer={name: adamw, eps: 1.0e-7, weight_decay: 0.01, weight_decays: {prototypes: 0.0}}"
    return ["configs/cub/prototree_lite0.yaml", optimizer, f"phases=[{', '.join(phases)}]", *changes]


def started(start: str, *changes: str, phases: Sequence[str] = (frozen(),)) -> list[str]:
    """Overrides of a trial with ProtoTree whose prototypes start elsewhere."""
    return tree("model.name=prototree_started", f"model.start={start}", *changes, phases=phases)


def net(*changes: str, phases: Sequence[str] = (SLOW,)) -> list[str]:
    """Overrides of a trial with ProtoPNet."""
    return ["configs/cub/protopnet_lite0.yaml", f"phases=[{', '.join(phases)}]", *changes]


PUSHED = pushed(frozen(epochs=20, prototypes=1e-2))
COSINE, EUCLIDEAN = "model.distance=cosine", "model.distance=l2"
TRIALS: Mapping[str, Sequence[str]] = {
    "tree_l2_16": tree(EUCLIDEAN, "model.channels=16", phases=[L2]),
    "tree_l2_64": tree(EUCLIDEAN, "model.channels=64", phases=[L2]),
    "tree_l2_256": tree(EUCLIDEAN, "model.channels=256", phases=[L2]),
    "tree_l2_16_batch64": tree(EUCLIDEAN, "model.channels=16", "data.batch_size=64", phases=[L2]),
    "tree_cosine_16": tree(COSINE, "model.channels=16"),
    "tree_cosine_64": tree(COSINE, "model.channels=64"),
    "tree_cosine_256": tree(COSINE, "model.channels=256"),
    "tree_cosine_64_depth8": tree(COSINE, "model.channels=64", "model.depth=8"),
    "tree_cosine_64_batch64": tree(COSINE, "model.channels=64", "data.batch_size=64"),
    "tree_cosine_64_slow": tree(COSINE, "model.channels=64", phases=[SLOW]),
    "tree_cosine_256_batch64": tree(COSINE, "model.channels=256", "data.batch_size=64"),
    "tree_cosine_256_depth8": tree(COSINE, "model.channels=256", "model.depth=8"),
    "tree_cosine_256_decay": tree(COSINE, "model.channels=256", "optimizer.weight_decay=0.1"),
    "tree_cosine_256_normal": started("normal", COSINE, "model.channels=256"),
    "tree_cosine_256_patches": started("patches", COSINE, "model.channels=256"),
    "tree_cosine_256_kmeans": started("kmeans", COSINE, "model.channels=256"),
    "tree_l2_16_patches": started("patches", EUCLIDEAN, "model.channels=16", phases=[L2]),
    "tree_l2_16_kmeans": started("kmeans", EUCLIDEAN, "model.channels=16", phases=[L2]),
    "tree_cosine_64_long": tree(COSINE, "model.channels=64", phases=[frozen(epochs=120)]),
    "tree_cosine_joint": tree(COSINE, "model.channels=64", phases=[frozen(), joint()]),
    "tree_cosine_joint_moving": tree(COSINE, "model.channels=64", phases=[frozen(), joint(backbone=4e-4, held=False)]),
    "tree_cosine_256_joint": tree(COSINE, "model.channels=256", phases=[frozen(), joint()]),
    "tree_cosine_256_joint_moving": tree(
        COSINE, "model.channels=256", phases=[frozen(), joint(backbone=4e-4, held=False)]
    ),
    "tree_l2_joint": tree(EUCLIDEAN, "model.channels=16", phases=[L2, joint(prototypes=1e-2)]),
    "net_l2": net(EUCLIDEAN),
    "net_cosine": net(COSINE),
    "net_cosine_linear": net(COSINE, "model.activation=linear"),
    "net_l2_joint": net(EUCLIDEAN, phases=[SLOW, joint(prototypes=1e-2)]),
    "net_cosine_joint": net(COSINE, phases=[SLOW, joint(prototypes=1e-2)]),
    "net_pushed": net("feature_copies=4", phases=[PUSHED]),
    "net_pushed_256": net("feature_copies=4", "model.channels=256", phases=[PUSHED]),
    "net_pushed_512": net("feature_copies=4", "model.channels=512", phases=[PUSHED]),
    "net_pushed_linear": net("feature_copies=4", "model.activation=linear", phases=[PUSHED]),
    "net_pushed_long": net("feature_copies=4", phases=[pushed(frozen(prototypes=1e-2))]),
    "net_gentle": net(
        "feature_copies=4",
        phases=[
            frozen(epochs=20, prototypes=1e-2, select="none"),
            pushed(joint(epochs=12, backbone=5e-5, add_on=3e-4, prototypes=3e-3)),
        ],
    ),
    "tree_config": ["configs/cub/prototree_lite0.yaml", "feature_copies=4"],
    "tree_moving": tree(
        "feature_copies=4", phases=[frozen(select="none"), ending(joint(backbone=4e-4, held=False), "prune, project")]
    ),
    "net_config": net(
        "feature_copies=4",
        phases=[
            "{name: warm, epochs: 20, schedule: cosine, lrs: {add_on: 1.0e-3, prototypes: 1.0e-2}, "
            f"{HELD}, on_end: [reset_optimizer], select: none}}",
            pushed(joint(epochs=12, prototypes=1e-2)),
        ],
    ),
}
"""Config and overrides of each trial."""


def overrides(name: str) -> list[str]:
    """The overrides of a trial's config that define it."""
    plugin = f"plugins=[{HERE / 'studies/prototype_starts.py'}]"
    return [f"feature_copies={COPIES}", *TRIALS[name][1:], "data.val_fraction=0.2", plugin]


def defined(name: str) -> dict[str, Any]:
    """What defines a trial, with all defaults written out: its records are of this and of nothing else."""
    node = as_dict(resolve(configured(TrainConfig, HERE / TRIALS[name][0], overrides(name))))
    data = {key: node["data"][key] for key in ("batch_size", "crop_to_box", "image_size", "transforms", "val_fraction")}
    phases = [{key: value for key, value in phase.items() if key not in ("name", "select")} for phase in node["phases"]]
    return {"data": data, **{key: node[key] for key in ("feature_copies", "model", "optimizer")}, "phases": phases}


def run(name: str, seed: int, folder: Path, root: str, cache: str, threads: int) -> dict[str, Any]:
    """Train one trial; what is recorded of it.

    Raises:
        SystemExit: if the training fails.
    """
    out, start = folder / name / str(seed), time.monotonic()
    whole = not (out / "config.yaml").is_file()
    definition, note = defined(name), out.with_suffix(".json")
    if note.is_file() and json.loads(note.read_text()) != definition:
        raise SystemExit(f"{out} is of another trial of this name; delete it and {note}")
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, definition)
    words = [
        *overrides(name), f"experiment={name}", f"seed={seed}", f"data.dataset.root={root}", f"feature_cache={cache}",
        "logger.wandb=disabled", "attention.every_n_epochs=1000",
    ]  # fmt: skip
    finish(out, [str(HERE / TRIALS[name][0]), *words], f"{name}, seed {seed}", threads)
    epochs = pd.read_csv(out / "metrics.csv").dropna(subset=["val/acc"])
    last = epochs.iloc[-1]
    found = {"train": last["train/acc"], "val": last["val/acc"], "best": epochs["val/acc"].max()}
    if set(definition["phases"][-1]["on_end"]) - {"reset_optimizer"}:
        found["before"] = epochs["val/acc"].iloc[-2]  # of the epoch before the last actions
    found |= {key: last[f"val/{of}"] for key, of in OF_TREES.items() if f"val/{of}" in last}
    minutes = {"minutes": round((time.monotonic() - start) / 60, 1)} if whole else {}
    return {
        "trial": name, "trial_seed": seed, "definition": definition, "epochs": len(epochs), **minutes,
        **{key: round(float(value), 4) for key, value in found.items()},
    }  # fmt: skip


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each trial, with the accuracies of its seeds in percent."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["trial"], []).append(record)

    def cells(key: str, own: Sequence[Mapping[str, Any]]) -> list[float]:
        return [100 * float(one[key]) for one in own if key in one]

    rows = []
    for name in [name for name in TRIALS if name in by_name]:
        own = sorted(by_name[name], key=lambda one: int(one["trial_seed"]))
        val, greedy = cells("val", own), cells("greedy", own)
        rows.append([
            f"`{name}`", str(own[0]["epochs"]), f"{mean(cells('train', own)):.1f}", ", ".join(f"{v:.1f}" for v in val),
            f"{mean(val):.1f}", f"{mean(cells('best', own)):.1f}", f"{mean(greedy):.1f}" if greedy else "–",
        ])  # fmt: skip
    return markdown(["Trial", "Epochs", "Training", "Validation by seed", "Mean", "Best epoch", "Greedy"], rows)


def main(argv: Sequence[str] | None = None) -> str:
    """Train the missing trials; returns the table of all records."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--names", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME", help="default: all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    p.add_argument("--root", default="data", help="folder of CUB-200-2011")
    p.add_argument("--cache", default="runs/features", help="folder of cached features")
    p.add_argument("--folder", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    p.add_argument("--list", action="store_true", help="train nothing")
    args = p.parse_args(argv)
    args.command = f"python -m studies.prototype_recipes --root FOLDER --names {' '.join(args.names)}"
    records = args.out / FOLDER
    records.mkdir(parents=True, exist_ok=True)
    for name in [] if args.list else args.names:
        for seed in args.seeds:
            path = records / f"{name}-{seed}.json"
            if not path.is_file():
                made = provenance("prototype_recipes", args, "validation images")  # of the code that runs
                write_json(path, made | run(name, seed, args.folder, args.root, args.cache, args.threads))
            elif json.loads(path.read_text())["definition"] != defined(name):
                raise SystemExit(f"{path} is of another trial of this name; delete it")
    return table([json.loads(path.read_text()) for path in sorted(records.glob("*.json"))])


if __name__ == "__main__":
    print(main())
