"""Fills the documents with the tables of stored results, at `<!-- benchmark:NAME -->` ... `<!-- /benchmark -->`."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, STUDIES
from benchmarks.views import tables_of

DOCS = RESULTS.parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def render(results: Mapping[str, Any]) -> str:
    """The markdown of a file of results: one line that says how they were measured, then the tables."""
    commit = (results["commit"] or "unknown")[:10]
    line = (
        f"`{_today(results['command'])}`; {results['date']}; {results['machine']}; threads {results['threads']}; "
        f"torch {results['torch']}; {results['images']}; seed {results['seed']}; commit {commit}"
        f"{' with changes' if results['dirty'] else ''}."
    )
    return "\n\n".join([line, *tables_of(results)])


def _today(command: str) -> str:
    """The recorded command with its module's present name: studies were in `benchmarks` when the first of them ran."""
    module = re.search(r"-m benchmarks\.(\w+)", command)
    is_study = module is not None and (STUDIES.parent / f"{module[1]}.py").is_file()
    return (command.replace("-m benchmarks.", "-m studies.", 1) if is_study else command).strip()


def show(path: Path) -> str:
    """The markdown of a file of results."""
    return render(json.loads(path.read_text(encoding="utf-8")))


def fill(text: str, *folders: Path) -> str:
    """The page with the contents of every block replaced; filling a page twice changes nothing."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        paths = [folder / f"{name}.json" for folder in folders or (RESULTS, STUDIES)]
        path = next((path for path in paths if path.is_file()), None)
        inside = show(path) if path else f"Not measured yet: benchmarks/results/{name}.json."
        return f"{match[1]}\n{inside}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


def pages() -> list[Path]:
    """The pages of docs/ that have blocks of results."""
    return [path for path in sorted(DOCS.rglob("*.md")) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Fill pages. With --check, write nothing and return 1 if a page is out of date."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("pages", type=Path, nargs="*", help="default: all pages of docs/ that have blocks of results")
    p.add_argument("--results", type=Path, nargs="+", default=[RESULTS, STUDIES], help="folders of the result files")
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
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
