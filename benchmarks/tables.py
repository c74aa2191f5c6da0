"""Puts the results of the benchmarks into a page, between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "results.md"
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
    parts = []
    if results["timings"]:
        head = ["work", "the floor counts", "passes per image", "time ÷ floor", "quartiles", "FLOPs ÷ floor"]
        parts.append(table(head, [_timing(row) for row in results["timings"]]))
    if results["memory"]:
        rows = [[row["what"], row["amount"], f"{row['mib']:.0f}"] for row in results["memory"]]
        parts.append(table(["work", "amount", "growth of peak memory, MiB"], rows))
    if results["values"]:
        rows = [[row["what"], f"{row['value']:.3g}", row["unit"]] for row in results["values"]]
        parts.append(table(["what", "value", "unit"], rows))
    commit = (results["commit"] or "unknown")[:10]
    parts.append(
        f"`{results['command']}`; {results['date']}; {results['machine']}; threads {results['threads']}; "
        f"torch {results['torch']}; {results['images']}; seed {results['seed']}; commit {commit}"
        f"{' with changes' if results['dirty'] else ''}."
    )
    return "\n\n".join(parts)


def _timing(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]
    passes = "" if row["passes"] is None else f"{row['passes']:g}"
    shares = "" if row["flops"] is None else f"{row['flops']:.4f}"
    quartiles = f"{ratio['q1']:.3f} to {ratio['q3']:.3f}"
    return [row["what"], row["floor"], passes, f"{ratio['median']:.3f}", quartiles, shares]


def show(path: Path) -> str:
    """The markdown of a file of results."""
    return render(json.loads(path.read_text(encoding="utf-8")))


def fill(text: str, folder: Path = RESULTS) -> str:
    """The page with every block made anew; filling it again changes nothing."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        path = folder / f"{name}.json"
        inside = show(path) if path.is_file() else f"Not measured yet: benchmarks/results/{name}.json."
        return f"{match[1]}\n{inside}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the page; with --check, only say whether that would change it (exit status 1)."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("page", type=Path, nargs="?", default=PAGE, help="docs/results.md by default")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    args = p.parse_args(argv)
    old = args.page.read_text(encoding="utf-8")
    new = fill(old, args.results)
    if args.check:
        return int(new != old)
    args.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
