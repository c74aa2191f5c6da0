"""Puts the results of the benchmarks into a page, between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, STUDIES

DOCS = RESULTS.parents[1] / "docs"
_MEAN = ", mean of "
_BLOCK = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers.

    >>> print(table(["what", "ms"], [["pass", "17"]]))
    | what | ms |
    | --- | ---: |
    | pass | 17 |
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(results: Mapping[str, Any]) -> str:
    """The markdown of one benchmark: its tables, and how they came about."""
    parts = _of_gpu(results) if "checks" in results else _of_rows(results)
    commit = (results["commit"] or "unknown")[:10]
    parts.append(
        f"`{_today(results['command'])}`; {results['date']}; {results['machine']}; threads {results['threads']}; "
        f"torch {results['torch']}; {results['images']}; seed {results['seed']}; commit {commit}"
        f"{' with changes' if results['dirty'] else ''}."
    )
    return "\n\n".join(parts)


def _of_rows(results: Mapping[str, Any]) -> list[str]:
    parts = []
    if results["timings"]:
        head = ["work", "the floor counts", "passes per image", "time ÷ floor", "quartiles", "FLOPs ÷ floor"]
        parts.append(table(head, [_timing(row) for row in results["timings"]]))
    if results["memory"]:
        rows = [[row["what"], row["amount"], f"{row['mib']:.0f}"] for row in results["memory"]]
        parts.append(table(["work", "amount", "growth of peak memory, MiB"], rows))
    of_runs = [row for row in results["values"] if ": " in row["what"]]
    parts += _pivoted([row for row in of_runs if _MEAN not in row["what"]])
    parts += _pivoted([row for row in of_runs if _MEAN in row["what"]])
    if others := [row for row in results["values"] if row not in of_runs]:
        rows = [[row["what"], f"{row['value']:.3g}", row["unit"]] for row in others]
        parts.append(table(["what", "value", "unit"], rows))
    return parts


def _pivoted(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of values named `RUN: MEASURE`; the longer of the two lists goes down. No table without values.

    Raises:
        ValueError: if a run has a measure twice.
    """
    cells: dict[tuple[str, str], str] = {}
    for row in values:
        run, measure = row["what"].split(": ", 1)
        cell = (run, f"{measure}, {row['unit']}" if row["unit"] else measure)
        if cell in cells:
            raise ValueError(f"{row['what']} stands twice in the results")
        cells[cell] = f"{row['value']:.3g}"
    if not cells:
        return []
    runs = list(dict.fromkeys(run for run, _ in cells))
    measures = list(dict.fromkeys(measure for _, measure in cells))
    if len(measures) > len(runs):
        rows = [[measure, *(cells.get((run, measure), "") for run in runs)] for measure in measures]
        return [table(["measure", *runs], rows)]
    return [table(["run", *measures], [[run, *(cells.get((run, m), "") for m in measures)] for run in runs])]


def _today(command: str) -> str:
    """The command under its name of today: studies were benchmarks when the first of them were run."""
    module = re.search(r"-m benchmarks\.(\w+)", command)
    is_study = module is not None and (STUDIES.parent / f"{module[1]}.py").is_file()
    return command.replace("-m benchmarks.", "-m studies.", 1) if is_study else command


def _of_gpu(results: Mapping[str, Any]) -> list[str]:
    """Of `benchmarks.gpu`: training steps, judging, passes, and how far checks are apart; what is empty is left out."""
    step = "training step of "
    ratios = {row["what"]: row["ratio"]["median"] for row in results["timings"]}
    memory = {row["what"]: f"{row['mib']:.0f}" for row in results["memory"]}
    values = [row for row in results["values"] if row["unit"] != "of its size apart"]
    steps = [row for row in values if row["what"].startswith(step)]
    parts = []
    if steps:
        rows = [
            [
                row["what"].removeprefix(step),
                f"{row['value']:.0f}",
                f"{ratios[row['what']]:.3f}" if row["what"] in ratios else "bare",
                memory.get(row["what"], ""),
            ]
            for row in steps
        ]
        head = ["training step", "images/s", "time ÷ bare backbone's, channels last", "peak memory, MiB"]
        parts.append(table(head, rows))
    judging = [row for row in results["timings"] if not row["what"].startswith(step)]
    if judging:
        rows = [[*_timing(row)[:5], memory.get(row["what"], "")] for row in judging]
        head = ["judging", "the floor counts", "passes per image", "time ÷ floor", "quartiles", "peak memory, MiB"]
        parts.append(table(head, rows))
    if others := [row for row in values if row not in steps]:
        parts.append(table(["what", "value", "unit"], [[r["what"], f"{r['value']:.3g}", r["unit"]] for r in others]))
    checks = results["checks"]
    if checks:
        rows = []
        for tolerance in sorted({check["tolerance"] for check in checks}):
            some = [check for check in checks if check["tolerance"] == tolerance]
            within = [check["apart"] for check in some if check["right"]]
            rows.append([f"{tolerance:g}", str(len(some)), str(len(within)), f"{max(within, default=0):.2g}"])
        parts.append(table(["checks allow", "checks", "within", "the furthest of these"], rows))
    if wrong := [check for check in checks if not check["right"]]:
        rows = [[check["what"], f"{check['apart']:.2g}", f"{check['tolerance']:g}"] for check in wrong]
        parts.append(table(["beyond it", "apart", "allowed"], rows))
    if results["failures"]:
        parts.append(table(["failed", "error"], [[row["what"], row["error"]] for row in results["failures"]]))
    if results["left"]:
        parts.append(f"{len(results['left'])} items were left for want of time.")
    return parts


def _timing(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]
    passes = "" if row["passes"] is None else f"{row['passes']:g}"
    shares = "" if row["flops"] is None else f"{row['flops']:.4f}"
    quartiles = f"{ratio['q1']:.3f} to {ratio['q3']:.3f}"
    return [row["what"], row["floor"], passes, f"{ratio['median']:.3f}", quartiles, shares]


def show(path: Path) -> str:
    """The markdown of a file of results."""
    return render(json.loads(path.read_text(encoding="utf-8")))


def fill(text: str, *folders: Path) -> str:
    """The page with every block made anew; filling it again changes nothing."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        paths = [folder / f"{name}.json" for folder in folders or (RESULTS, STUDIES)]
        path = next((path for path in paths if path.is_file()), None)
        inside = show(path) if path else f"Not measured yet: benchmarks/results/{name}.json."
        return f"{match[1]}\n{inside}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


def pages() -> list[Path]:
    """The pages of the docs that have blocks of results."""
    return [path for path in sorted(DOCS.rglob("*.md")) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Fill pages; with --check, only say whether that would change one (exit status 1)."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("pages", type=Path, nargs="*", help="all pages of docs/ with results by default")
    p.add_argument("--results", type=Path, nargs="+", default=[RESULTS, STUDIES], help="folders of the results")
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    args = p.parse_args(argv)
    stale = 0
    for page in args.pages or pages():
        old = page.read_text(encoding="utf-8")
        new = fill(old, *args.results)
        stale |= new != old
        if not args.check and new != old:
            page.write_text(new, encoding="utf-8")
    return int(stale and args.check)


if __name__ == "__main__":
    raise SystemExit(main())
