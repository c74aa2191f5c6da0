"""The commands beside the numbers of the documentation exist, and their options are understood."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from interp_models import InputError
from tests.test_docs import check_command

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if page.parent.name == "results" or re.search(r"-m (benchmarks|studies)\.", page.read_text(encoding="utf-8"))
]
CODE = re.compile(r"`(python [^`]+|pytest [^`]+)`")
VALUES = {"MODEL": "cnn", "SEED": "0", "RATE": "1e-3"}
"""What stands for a value in a command."""


def commands(text: str) -> list[str]:
    """The commands between backticks, each on one line."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in CODE.findall(text)]


def check_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fail if a command's module, file, option or key does not exist."""
    for word, value in VALUES.items():
        command = command.replace(word, value)
    if command.startswith(("python train.py ", "python evaluate.py ")):
        check_command(command)
        return
    words = shlex.split(command)
    if words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), command
    elif re.match(r"python -m (benchmarks|studies)\.", command):
        with pytest.raises(SystemExit) as done:
            import_module(words[2]).main(["--help"])
        assert done.value.code == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        own = words[: words.index("--")] if "--" in words else words  # the rest are options of other benchmarks
        assert {word for word in own if word.startswith("--")} <= known, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_commands_of_results_exist(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text(encoding="utf-8")):
        check_known(command, capsys)


def test_commands_that_do_not_exist_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = "`python -m studies.trained --runs\nRUN` and `pytest -m slow tests/test_results.py`"
    right = commands(text)
    assert right == ["python -m studies.trained --runs RUN", "pytest -m slow tests/test_results.py"]
    for command in right:
        check_known(command, capsys)
    with pytest.raises(AssertionError, match="--rums"):
        check_known("python -m studies.trained --rums RUN", capsys)
    with pytest.raises(ModuleNotFoundError, match="traned"):
        check_known("python -m studies.traned --runs RUN", capsys)
    with pytest.raises(AssertionError, match="nowhere"):
        check_known("pytest tests/nowhere.py", capsys)
    with pytest.raises(InputError, match="sed"):
        check_known("python train.py configs/cub/MODEL_lite0.yaml sed=SEED", capsys)


@pytest.mark.parametrize(
    "module",
    sorted(
        f"{path.parent.name}.{path.stem}" for room in ("benchmarks", "studies") for path in ROOT.glob(f"{room}/*.py")
    ),
)
def test_every_benchmark_and_study_has_help(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = getattr(import_module(module), "main", None)
    if main is None:
        pytest.skip("a part of others")
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    assert "usage: " in capsys.readouterr().out
