"""The tutorials run, from the first cell to the last, without a network.

They are run by `docs/notebooks.py` and not by nbclient, which needs a Jupyter kernel and 30 packages for what `exec`
does: the cells are plain Python. Jupyter shows the same.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/tutorials/*.ipynb"))


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook_of(*sources: str) -> dict[str, Any]:
    return {"cells": [{"cell_type": "code", "source": source.splitlines(True), "outputs": []} for source in sources]}


def run(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "docs" / "notebooks.py"), str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorials(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path)
    done = run(tmp_path / path.name)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in json.loads((tmp_path / path.name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    stored = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for ours, theirs in zip(cells, stored, strict=True):
        assert [output.get("data", {}).keys() for output in ours["outputs"]] == [
            output.get("data", {}).keys() for output in theirs["outputs"]
        ], "the outputs that the notebook holds are of another version: run python docs/notebooks.py"


def test_every_tutorial_is_in_order_and_has_its_outputs(notebooks: ModuleType) -> None:
    assert sorted(notebooks.ORDER) == [path.stem for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert cells[0]["source"][0].startswith("# ")
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert sum(bool(cell["outputs"]) for cell in code) >= 4
        assert str(ROOT) not in path.read_text()


def test_cells_share_names_and_show_their_last_line(notebooks: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(
        json.dumps(
            notebook_of("x = 20\nprint(x)\nx + 1", "x * 2;\ny = x", "from PIL import Image\nImage.new('L', (1, 1))")
        )
    )
    done = run(path)
    assert done.returncode == 0, done.stderr
    first, second, third = (cell["outputs"] for cell in json.loads(path.read_text())["cells"])
    assert first[0]["text"] == ["20\n"]
    assert first[1]["data"] == {"text/plain": ["21"]}
    assert second == []
    assert set(third[0]["data"]) == {"text/plain", "image/png"}
    page = notebooks.markdown(json.loads(path.read_text()), "a")
    assert "```python\nx = 20\nprint(x)\nx + 1\n```" in page
    assert "```text\n21\n```" in page
    assert "(data:image/png;base64,iVBOR" in page


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "must not need a network"),
    ],
)
def test_a_cell_that_fails_is_an_error(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(notebook_of("1", source)))
    done = run(path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "<cell 2>" in done.stderr or message != "ZeroDivisionError"
