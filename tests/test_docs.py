"""What the documentation shows is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`((?:interp_models|tests)/[\w/]+\.py)`[^`]*?```python\n(.*?)```", re.DOTALL)


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


def test_the_examples_of_new_files_keep_the_contracts(tmp_path):
    """In a copy of the package the three complete examples need no edit elsewhere, and pass contracts and own tests."""
    for folder in ("interp_models", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    written = []
    for page in sorted(ROOT.glob("docs/adding-*.md")):
        files = FILE.findall(page.read_text())
        assert len(files) == 2, f"{page.name} shows a file and its test"
        for name, text in files:
            assert not (tmp_path / name).exists(), f"{name} exists already"
            (tmp_path / name).write_text(text)
            written.append(name)
    names = [Path(name).stem for name in written if name.startswith("interp_models/")]
    assert len(names) == 3
    tests = [name for name in written if name.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    selection = "(" + " or ".join(names) + ") and not resnet18"
    for arguments in (["tests/contract", "-k", selection], tests):
        run = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:]
