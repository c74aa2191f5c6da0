"""Time ÷ floor of this commit beside that of an older one.

python -m benchmarks.against COMMIT --benchmarks explainers faithfulness --rounds 3 -- --count 4 --pairs 3 --threads 1

The older commit is checked out into a temporary folder. Each round runs every benchmark at both commits, in turn, so
that both meet the same load of the machine. All pairs of work and floor of a row are pooled over the rounds. The page
shows the median of their ratios at both commits, and new ÷ old. Words after `--` are options of the benchmarks.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Value, plain_parser, summary, write
from benchmarks.tables import show

ROOT = Path(__file__).parents[1]
Pairs = dict[str, list[tuple[float, float]]]
"""Seconds of (work, floor) by row."""


def measured(checkout: Path, benchmark: str, options: Sequence[str], out: Path) -> Pairs:
    """Run a benchmark of a checkout in a process; returns its pairs."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--out", str(out), *options]
    subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True, stdout=subprocess.DEVNULL
    )
    timings = json.loads((out / f"{benchmark}.json").read_text())["timings"]
    return {row["what"]: [(work, floor) for work, floor in row["pairs"]] for row in timings}


def compared(old: Pairs, new: Pairs) -> list[Value]:
    """Rows of what both have.

    >>> [round(row.value, 2) for row in compared({"CAM": [(2.0, 1.0)]}, {"CAM": [(1.0, 1.0)], "new": [(1.0, 1.0)]})]
    [2.0, 1.0, 0.5]
    """
    rows: list[Value] = []
    for what in (name for name in old if name in new):
        before, after = summary(old[what]).median, summary(new[what]).median
        label = what.replace(": ", ", ")
        rows += [
            Value(f"{label}: old", before, "time ÷ floor"),
            Value(f"{label}: new", after, "time ÷ floor"),
            Value(f"{label}: new ÷ old", after / before, ""),
        ]
    return rows


def shown(options: Sequence[str]) -> list[str]:
    """The options without paths.

    >>> shown(["--images", "/home/me/CUB", "--pairs", "3"])
    ['--images', 'FOLDER', '--pairs', '3']
    """
    before = ["", *options[:-1]]
    return ["FOLDER" if last in ("--images", "--cub") else word for last, word in zip(before, options, strict=True)]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = plain_parser(__doc__)
    p.add_argument("commit", help="the older commit")
    p.add_argument("--benchmarks", nargs="+", default=["explainers", "faithfulness"])
    p.add_argument("--rounds", type=int, default=3)
    words = list(sys.argv[1:] if argv is None else argv)
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = p.parse_args(own)
    torch.set_num_threads(int(options[options.index("--threads") + 1]) if "--threads" in options else args.threads)
    words = [args.commit, "--benchmarks", *args.benchmarks, "--rounds", str(args.rounds), "--", *shown(options)]
    args.command = f"python -m benchmarks.against {' '.join(words)}"
    checkouts: dict[str, Path] = {"new": ROOT}
    found: dict[str, Pairs] = {"old": {}, "new": {}}
    with tempfile.TemporaryDirectory() as name:
        checkouts["old"] = Path(name) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", checkouts["old"], args.commit], cwd=ROOT, check=True)
        try:
            for number in range(args.rounds):
                for benchmark in args.benchmarks:
                    for which in ("old", "new"):
                        out = Path(name) / f"{which}{number}"
                        for what, pairs in measured(checkouts[which], benchmark, options, out).items():
                            found[which].setdefault(what, []).extend(pairs)
                        print(f"round {number + 1}: {benchmark}, {which}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", checkouts["old"]], cwd=ROOT, check=True)
    pairs = sum(len(part) for part in found["new"].values()) // max(1, len(found["new"]))
    return write("against", args, f"{pairs} pairs per row", compared(found["old"], found["new"]))


if __name__ == "__main__":
    print(show(main()))
