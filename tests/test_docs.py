"""What the documentation shows is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tables

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FILE = re.compile(
    r"`((?:interp_models|tests|configs)/[\w/]+\.(?:py|yaml))`[^`]*?```(?:python|yaml)\n(.*?)```", re.DOTALL
)


def test_readme_examples(bcnn_run, tmp_path, monkeypatch):
    """The three lines that explain an image, the three that score a map, and a model from elsewhere."""
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.jpg"
    Image.new("RGB", (90, 70), (200, 30, 60)).save(image)
    names = {"RUN": bcnn_run, "IMAGE": image}
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
        if "values" in names:
            assert set(names["values"]) == {"dauc", "dc", "iauc", "ic"}
    assert names["maps"].shape == (2, 2, 2)
    assert Image.open("map.png").size == (64, 64)
    assert bool(torch.isfinite(names["maps"]).all())


def test_the_example_of_averages():
    (block,) = BLOCK.findall((ROOT / "docs" / "explainers.md").read_text())
    names = {}
    exec(block, names)
    assert names["smooth"].shape == names["integrated"].shape == (2, 62, 62)


COPIED = (
    "benchmarks", "configs", "docs", "interp_models", "tests", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md",
    "LICENSE", "Makefile", "README.md", "constraints.txt", "evaluate.py", "mkdocs.yml", "pyproject.toml", "studies",
    "train.py",
)  # fmt: skip
"""What a clone holds, as far as there is such a thing."""
PAGES = sorted(ROOT.glob("docs/adding-*.md"))


def examples() -> dict[str, str]:
    """The complete files that the pages show, by their path in the repository."""
    found: dict[str, str] = {}
    for page in PAGES:
        files = FILE.findall(page.read_text())
        assert sum(name.startswith("interp_models/") for name, _ in files) == 1, f"{page.name} shows a file"
        assert sum(name.startswith("tests/") for name, _ in files) == 1, f"{page.name} shows its test"
        found |= dict(files)
    return found


def clone(to: Path) -> dict[str, str]:
    """A copy of the repository with the examples and the tables that they change; nothing else is edited."""
    written = examples()
    if all((ROOT / name).exists() for name in written):
        pytest.skip("this is such a clone")
    to.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    for name, text in written.items():
        assert not (to / name).exists(), f"{name} exists already"
        (to / name).write_text(text)
    run(to, "tests.tables")
    return written


def run(folder: Path, *arguments: str) -> str:
    """`python -m ...` in a folder whose package shadows the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


PYTEST = ("pytest", "-q", "-p", "no:cacheprovider")


def test_the_examples_of_new_files_keep_the_contracts(tmp_path):
    """Of a model, an explainer, a metric, a data set and an augmentation: contracts, own tests, style."""
    written = clone(tmp_path / "clone")
    names = [Path(name).stem for name in written if name.startswith("interp_models/")]
    assert len(names) == len(PAGES) == 5
    tests = [name for name in written if name.startswith("tests/")]
    sources = [name for name in written if name.endswith(".py")]
    run(tmp_path / "clone", "ruff", "check", "--no-cache", *sources)
    run(tmp_path / "clone", "ruff", "format", "--no-cache", "--check", *sources)
    selection = "(" + " or ".join(names) + ") and not resnet18"
    run(tmp_path / "clone", *PYTEST, "-p", "no:xdist", "tests/contract", "-k", selection)
    run(tmp_path / "clone", *PYTEST, "-p", "no:xdist", *tests)


@pytest.mark.slow
def test_the_whole_suite_passes_with_the_examples(tmp_path):
    """All fast tests, in a clone to which nothing but the examples' files was added."""
    clone(tmp_path / "clone")
    out = run(tmp_path / "clone", *PYTEST, "-n", "auto")
    assert int(re.search(r"(\d+) passed", out)[1]) > 3000


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_tables_are_up_to_date(page):
    text = page.read_text()
    assert tables.rewritten(text) == text, f"docs/{page.name} is stale: run {tables.COMMAND}"


def test_every_table_is_shown_and_a_stale_one_is_found():
    shown = {name for page in tables.pages() for _, name, _, _ in tables.MARKED.findall(page.read_text())}
    assert shown == set(tables.TABLES)
    page = (ROOT / "docs" / "explainers.md").read_text()
    stale = page.replace("| `rise` | masks + 1 |", "| `rise` | masks |")
    assert stale != page == tables.rewritten(stale)
