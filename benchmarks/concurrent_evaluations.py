"""Whether two evaluations of one run at the same time leave complete and right tables.

python -m benchmarks.concurrent_evaluations --root ../CUB --pairs 20

A short training of B-CNN on CUB is evaluated by two commands, each alone. Then both start on a fresh copy of the run,
the second after a random delay. In a second series one of the two is killed (SIGKILL) at a random moment. Two kinds of
folders are counted: those whose table, values per image and maps equal exactly those of one command alone, and those
for which this holds after the first command is repeated.
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Row, Value, plain_parser, write
from benchmarks.interruptions import TRAINING, same_evaluation
from tests.processes import run, start

COMMON = ["n_images=8", "max_steps=8", "batch_size=2", "report_images=1", "logger.wandb=disabled"]
PLANS = (
    ["explainers=[intrinsic, {name: rise, masks: 24}]", *COMMON],
    ["explainers=[{name: rise, masks: 20}, fakecam]", *COMMON],
)
"""Overrides of the two commands."""


SERIES = ("both", "killed")


def measure(root: str, pairs: int, seed: int, series: Sequence[str] = SERIES) -> list[Row]:
    """All rows of both series."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, trained = folder / "log", folder / "trained" / "run"
        config = ["configs/cub/bcnn_lite0.yaml", f"data.dataset.root={root}", *TRAINING, f"out={trained}"]
        _succeeds(run("train", [*config, "phases[0].epochs=1"], log), log)
        alone, seconds = [], []
        for number, plan in enumerate(PLANS):
            alone.append(Path(shutil.copytree(trained, folder / f"alone{number}" / "run")))
            begin = time.monotonic()
            _succeeds(run("evaluate", [str(alone[-1]), *plan], log), log)
            seconds.append(time.monotonic() - begin)
        rows: list[Row] = [Value("pairs in each series", pairs, "")]
        for kills in (name == "killed" for name in series):
            counts = dict.fromkeys(("refused", "finished", "whole", "right", "right when repeated"), 0)
            for number in range(pairs):
                copy = Path(shutil.copytree(trained, folder / f"pair{kills}{number}" / "run"))
                plans = [PLANS[0], draw.choice(PLANS)]
                processes = []
                for plan in plans:
                    processes.append(start("evaluate", [str(copy), *plan], log))
                    time.sleep(draw.uniform(0, 0.8 * seconds[0]) if len(processes) == 1 else 0)
                if kills:
                    time.sleep(draw.uniform(0, 0.8 * seconds[0]))
                    draw.choice(processes).kill()
                for process in processes:
                    process.join()
                counts["refused"] += sum(process.exitcode == 2 for process in processes)
                counts["finished"] += sum(process.exitcode == 0 for process in processes)
                if (copy / "evaluation/results.json").is_file():
                    counts["whole"] += 1
                    counts["right"] += any(same_evaluation(copy, other) for other in alone)
                _succeeds(run("evaluate", [str(copy), *plans[0]], log), log)
                counts["right when repeated"] += same_evaluation(copy, alone[0])
                shutil.rmtree(copy.parent)
                print(f"{'one killed' if kills else 'both go on'}, pair {number + 1}: {counts}", flush=True)
            what = "one is killed" if kills else "both go on"
            rows += [
                Value(f"{what}: commands that were refused in one line", counts["refused"], f"of {2 * pairs}"),
                Value(f"{what}: commands that came to their end", counts["finished"], f"of {2 * pairs}"),
                Value(f"{what}: tables found", counts["whole"], f"of {pairs}"),
                Value(f"{what}: tables equal to one made alone", counts["right"], f"of {counts['whole']}"),
                Value(f"{what}: equal after repeating", counts["right when repeated"], f"of {pairs}"),
            ]
    return rows


def _succeeds(code: int | None, log: Path) -> None:
    if code:
        sys.exit(log.read_text()[-2000:])


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `concurrent_evaluations.json`."""
    p = plain_parser(__doc__)
    p.add_argument("--root", required=True, help="folder of CUB-200-2011, or of a part of it")
    p.add_argument("--pairs", type=int, default=20, help="pairs of evaluations in each series")
    p.add_argument(
        "--series",
        nargs="+",
        choices=SERIES,
        default=SERIES,
        help="`both`: neither is killed; `killed`: one of the two is",
    )
    args = p.parse_args(argv)
    args.command = f"python -m benchmarks.concurrent_evaluations --root FOLDER --pairs {args.pairs}"
    return write("concurrent_evaluations", args, "CUB-200-2011", measure(args.root, args.pairs, args.seed, args.series))


if __name__ == "__main__":
    print(main())
