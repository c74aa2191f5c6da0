"""LaTeX tables compile, and the document shows their text."""

import shutil
import string
import subprocess
from pathlib import Path
from typing import Any

import pytest

from interp_models.report.text import latex_table, table_cells

TOOLS = [name for name in ("pdflatex", "pdftotext") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(TOOLS), reason=f"{' and '.join(TOOLS)} not installed (texlive-latex-recommended, poppler-utils)"
)
DOCUMENT = r"""\documentclass{article}
\usepackage[paperwidth=100cm, paperheight=20cm, margin=1cm]{geometry}
\usepackage{cmap}
\usepackage[T1]{fontenc}
\usepackage{booktabs}
\pagestyle{empty}
\begin{document}
%s
\end{document}
"""
PUNCTUATION = "".join(c for c in string.punctuation if c not in "`'\"-")  # TeX makes typographic signs of these


def row(explainer: str, metric: str, mean: float | None, *, best: bool = False) -> dict[str, Any]:
    return {
        "run": "100 % of R&D_1", "explainer": explainer, "metric": metric, "mean": mean, "std": 0.125, "n": 4,
        "n_undefined": int(explainer == "[plain]"), "higher_is_better": metric == "iic", "target": "prediction",
        "preset": "gomez2023", "grid": (7, 7), "best": best, "low": None if mean is None else mean - 0.1,
        "high": None if mean is None else mean + 0.1, "options": {},
    }  # fmt: skip


@pytest.mark.parametrize("deviations", [False, True])
def test_tables_compile_and_show_their_text(tmp_path: Path, deviations: bool) -> None:
    names = ("[plain]", f"all {PUNCTUATION}", "Vögel čaro")
    rows = [row(name, key, 0.5, best=name == "[plain]") for name in names for key in ("ad", "iic", "dauc")]
    rows[-1] |= {"mean": None, "low": None, "high": None}
    costs = {"[plain]": {"passes": 1.0, "seconds": 0.25}}
    (tmp_path / "table.tex").write_text(DOCUMENT % latex_table(rows, costs, deviations=deviations))
    line = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
    line = ["pdftotext", "-layout", "table.pdf", "-"]
    text = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    heads, lines, _ = table_cells(rows, {} if deviations else costs, deviations=deviations)
    shown = [line.split() for line in text.splitlines() if line.strip()]
    expected = [" ".join(heads), *(" ".join(cell for cell, _ in cells) for cells in lines)]
    assert shown == [line.split() for line in expected]
