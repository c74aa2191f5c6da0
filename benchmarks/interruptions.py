"""Whether work that is killed (SIGKILL) at random moments and resumed ends like work without interruption.

python -m benchmarks.interruptions --root ../CUB --kills 3

A short training of B-CNN on CUB and an evaluation of it run once without interruption, and once killed several times.
The weights, metrics.csv, results.json, per_image.parquet and the maps are compared, exactly.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.harness import Row, Value, plain_parser, write

TRAINING = [
    "phases[0].epochs=3",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "logger.wandb=disabled",
]
EVALUATION = [
    "explainers=[intrinsic, gradcam, {name: rise, masks: 50}, random]",
    "n_images=12",
    "max_steps=10",
    "batch_size=4",
    "logger.wandb=disabled",
]


def kill_and_resume(first: list[str], again: list[str], ready: Path, moments: Sequence[float]) -> list[float]:
    """Run a command, kill it after each of these numbers of seconds, then run it to its end.

    Args:
        first: the command.
        again: the command that resumes.
        ready: the file from which on the work can be resumed.
        moments: seconds after which the process is killed.

    Returns:
        The seconds that each process lived.
    """
    lived = []
    for moment in [*moments, None]:
        begin = time.monotonic()
        process = subprocess.Popen(again if ready.exists() else first, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            if code:
                raise SystemExit(f"{' '.join(again)}: exit code {code}")
        lived.append(time.monotonic() - begin)
    return lived


def same_weights(a: Path, b: Path) -> bool:
    """Whether the weights and buffers of both checkpoints are equal."""
    for name in ("best", "last"):
        one, two = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"] for run in (a, b))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    return True


def same_table(a: Path, b: Path) -> bool:
    """Whether metrics.csv is equal."""
    return (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


def same_evaluation(a: Path, b: Path) -> bool:
    """Whether tables, values per image and maps are equal, except for the names of the runs."""
    a, b = a / "evaluation", b / "evaluation"
    tables = [(pd.read_parquet(run / "per_image.parquet").drop(columns="run")) for run in (a, b)]
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (a, b)]
    same_rows = all(x | {"run": ""} == y | {"run": ""} for x, y in zip(*rows, strict=True))
    maps = [{path.name: np.load(path) for path in (run / "maps").glob("*.npy")} for run in (a, b)]
    same_maps = maps[0].keys() == maps[1].keys() and all(np.array_equal(maps[0][key], maps[1][key]) for key in maps[0])
    return tables[0].equals(tables[1]) and same_rows and same_maps


def measure(root: str, kills: int, seed: int) -> list[Row]:
    """All rows: training, then evaluation."""
    draw = random.Random(seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "one", "run"), Path(folder, "two", "run")
        train = [sys.executable, "train.py"]
        config = ["configs/cub/bcnn_lite0.yaml", f"data.dataset.root={root}", *TRAINING]
        evaluate = [sys.executable, "evaluate.py"]
        (left_alone,) = kill_and_resume([*train, *config, f"out={whole}"], [], Path(folder, "none"), [])
        moments = [draw.uniform(0.3, 0.9) * left_alone for _ in range(kills)]
        first = [*train, *config, f"out={broken}"]
        lived = kill_and_resume(first, [*train, f"resume={broken}"], broken / "config.yaml", moments)
        rows += _rows("training", left_alone, lived, same_weights(whole, broken) and same_table(whole, broken))
        (left_alone,) = kill_and_resume([*evaluate, str(whole), *EVALUATION], [], Path(folder, "none"), [])
        moments = [draw.uniform(0.3, 0.9) * left_alone for _ in range(kills)]
        command = [*evaluate, str(broken), *EVALUATION]
        lived = kill_and_resume(command, command, Path(folder, "none"), moments)
        rows += _rows("evaluation", left_alone, lived, same_evaluation(whole, broken))
    return rows


def _rows(what: str, left_alone: float, lived: Sequence[float], same: bool) -> list[Row]:
    times = [Value(f"{what}, killed after", seconds, "s") for seconds in lived[:-1]]
    return [
        Value(f"{what}, left alone", left_alone, "s"),
        *times,
        Value(f"{what}, resumed to its end", lived[-1], "s"),
        Value(f"{what}, the same as left alone", float(same), "(1: yes)"),
    ]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `interruptions.json`."""
    p = plain_parser(__doc__)
    p.add_argument("--root", required=True, help="folder of CUB-200-2011, or of a part of it")
    p.add_argument("--kills", type=int, default=3, help="kills of the training, and of the evaluation")
    args = p.parse_args(argv)
    args.command = f"python -m benchmarks.interruptions --root FOLDER --kills {args.kills}"
    return write("interruptions", args, "CUB-200-2011", measure(args.root, args.kills, args.seed))


if __name__ == "__main__":
    print(main())
