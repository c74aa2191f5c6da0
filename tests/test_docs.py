"""What the documentation shows is run."""

import html
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.resnet import BasicBlock, ResNet

from interp_models import DATASETS, InputError
from interp_models.commands.cli import taken
from interp_models.commands.help import help_text
from interp_models.config.loading import configured
from interp_models.config.shipped import config_path
from interp_models.data.module import DataModule
from interp_models.evaluation.config import EvaluateConfig
from interp_models.runs.config import TrainConfig
from tests import tables
from tests.test_architecture import ROOMS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FILE = re.compile(
    r"`((?:interp_models|tests|configs)/[\w/]+\.(?:py|yaml))`[^`]*?```(?:python|yaml)\n(.*?)```", re.DOTALL
)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def test_the_readme_judges_a_resnet(tmp_path, monkeypatch):
    """Its lines as they are, with a smaller ResNet; `test_wheel` has the real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, colour in (("a", (200, 30, 60)), ("b", (20, 130, 60))):
        Image.new("RGB", (90, 70), colour).save(tmp_path / "photos" / f"{name}.jpg")
    asked = []

    def random_weights(weights=None):
        asked.append(weights)
        return ResNet(BasicBlock, [1, 1, 1, 1])

    monkeypatch.setattr(torchvision.models, "resnet18", random_weights)
    (block,) = blocks("README.md")
    assert len([line for line in block.splitlines() if line]) <= 10
    names = {}
    exec(block, names)
    assert asked == [torchvision.models.ResNet18_Weights.DEFAULT]
    result, explainers = names["result"], names["explainers"]
    assert list(result.maps) == explainers
    assert set(result.per_image["image_id"]) == {"a.jpg", "b.jpg"}
    assert all(f"| {name} |" in result.to_markdown() for name in explainers)
    classes = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert html.escape(classes[result.per_image["prediction"].iloc[0]]) in (tmp_path / "report.html").read_text()


def test_python_examples(bcnn_run, tmp_path, monkeypatch):
    """A model judged, an image explained, its map scored, and a model from elsewhere."""
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.jpg"
    Image.new("RGB", (90, 70), (200, 30, 60)).save(image)
    names = {"RUN": bcnn_run, "IMAGE": image}
    judged, *others = blocks("docs/python.md")
    exec(judged, names)
    assert set(names["found"].summary["metric"]) == {"dauc", "ad"}
    assert Path("report.html").is_file()
    assert len(others) == 3
    for block in others:
        exec(block, names)
    assert set(names["values"]) == {"dauc", "dc", "iauc", "ic", "lerf", "abpc"}
    assert names["maps"].shape == (2, 2, 2)
    assert Image.open("map.png").size == (64, 64)
    assert bool(torch.isfinite(names["maps"]).all())


SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
SHELL_PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    if re.search(r"(train|evaluate)\b", "".join(SHELL.findall(page.read_text())))
)


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_commands_are_understood(page, monkeypatch):
    """Every key of a command that a page shows is one of the config that it names."""
    monkeypatch.chdir(ROOT)
    lines = [line for block in SHELL.findall((ROOT / page).read_text()) for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(python |interp-)(train|evaluate)", line)]
    assert commands
    for line in commands:
        check_command(line)


def check_command(line: str) -> None:
    command, *words = shlex.split(line.removeprefix("python "), comments=True)
    schema = TrainConfig if "train" in command else EvaluateConfig
    if "--help" in words:
        topics = words[words.index("--help") + 1 :]
        assert help_text("", schema, topics)
        return
    options = [word for word in words if word.startswith("--")]
    assert set(options) <= {"--list", "--list-runs", "--ensemble"}, line
    positional = [word for word in words if "=" not in word and word not in options]
    config, overrides = taken([word for word in words if "=" in word], "config")
    resumed, overrides = taken(overrides, "resume")
    if schema is TrainConfig:
        assert len(positional) <= 1
        config = next(iter(positional), None)
    source = (
        {}
        if resumed or (config or "").isupper() or config == "CONFIG.yaml"
        else config_path(config or DEFAULTS[schema])
    )
    if not resumed and not options:
        configured(schema, source, [part for part in overrides if not (source == {} and "[" in part)])


DEFAULTS = {TrainConfig: "quickstart", EvaluateConfig: "eval/faithfulness"}


def test_a_command_that_is_not_understood_is_found():
    check_command("python evaluate.py RUN n_images=20")
    with pytest.raises(InputError, match="n_imags"):
        check_command("python evaluate.py RUN n_imags=20")


def test_the_architecture_names_all_rooms_and_arrows():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| Room | What it holds | Imports from |") :].split("\n\n")[0].splitlines()[2:]
    named: dict[str, set[str]] = {}
    for line in table:
        room, _, arrows = (cell.strip() for cell in line.split("|")[1:-1])
        named[room.strip("`")] = set(named) if arrows == "all above" else set(re.findall(r"`(\w+)`", arrows))
    assert named == {room: set(arrows.split()) for room, arrows in ROOMS.items()}


def test_the_figure_of_the_controls_is_that_of_the_table():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    found = figures.counts((ROOT / "docs" / "results" / "posthoc.md").read_text())
    assert set(figures.CONTROLS) < set(found)
    assert found["fakecam"]["AD"] == (0, 29)
    assert found["random"]["IAUC"] == (28, 1)
    assert list(found["gt_box"]) == ["AD", "IIC", "ADD", "AG", "DAUC", "DC", "IAUC", "IC"]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(links) > 25
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_example_of_averages():
    (block,) = blocks("docs/explainers.md")
    names = {}
    exec(block, names)
    assert names["smooth"].shape == names["integrated"].shape == (2, 62, 62)


def test_the_example_of_a_class_activation_map():
    block = next(block for block in blocks("docs/adding-an-explainer.md") if "squared_cam" in block)
    code = f"{block}\nassert maps.shape == (2, 32, 32) and float(maps.std()) > 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)  # in a registry of its own


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


@pytest.mark.slow
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


def test_the_example_of_several_labels():
    """It is judged and read as any data set; then its name is taken away again."""
    example = next(block for block in blocks("docs/adding-a-dataset.md") if '"stripes"' in block)
    try:
        exec(example, {"__name__": "stripes_example"})
        data = DataModule(dataset={"name": "stripes"}, image_size=64, num_workers=0)
        batch = next(iter(data.test_dataloader()))
    finally:
        DATASETS._known.pop("stripes", None)
    assert batch.label[:4].tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert batch.image.dtype == torch.float32
    assert float(batch.image.max()) == 1
    assert data.summary().startswith("2 classes, several per image; ")
