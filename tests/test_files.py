"""One process at a time writes to a folder, and a lock does not outlive the process that held it."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from interp_models.core.errors import InputError
from interp_models.core.files import HOLDER, LOCK, locked, new_folder, short, whole

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, ready: Path) -> None:
    with locked(folder, "an evaluation"):
        (folder / ".half.1234.partial").write_text("of a killed process")
        ready.touch()
        time.sleep(60)


def test_a_second_one_is_told_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    folder, ready = tmp_path / "results", tmp_path / "ready"
    process = CONTEXT.Process(target=hold, args=(folder, ready))
    process.start()
    while not ready.exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(InputError) as told, locked(folder, "an evaluation", "wait"):
        pass
    assert str(told.value).startswith(f"{folder} is in use by an evaluation of process {process.pid} on ")
    assert str(told.value).endswith("; wait")
    assert (folder / ".half.1234.partial").exists()
    process.kill()
    process.join()
    with locked(folder, "an evaluation"):
        assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
        assert f"process {os.getpid()} " in (folder / HOLDER).read_text()
    with locked(folder, "an evaluation"):  # it is free again
        pass


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    """A run's folder is locked by a training, its evaluation by another process."""
    for name in ("checkpoints", "evaluation"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "evaluation", "an evaluation"):
        (tmp_path / "evaluation/.report.html.12.partial").touch()
        (tmp_path / "checkpoints/.last.ckpt.34.partial").touch()
        with locked(tmp_path, "a training"):
            assert (tmp_path / "evaluation/.report.html.12.partial").exists()
            assert not (tmp_path / "checkpoints/.last.ckpt.34.partial").exists()


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/results cannot be written \(Not a directory\), which an evaluation"):
        locked(tmp_path / "file" / "results", "an evaluation").__enter__()
    with pytest.raises(InputError, match=r"folder .*file/runs/0 cannot be made: Not a directory; out= names another"):
        new_folder(tmp_path / "file" / "runs")
    assert new_folder(tmp_path / "runs", "0-") == tmp_path / "runs" / "0-0"
    assert new_folder(tmp_path / "runs", "0-") == tmp_path / "runs" / "0-1"


def test_two_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with whole(path) as first, whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # the context that ends last
    assert list(tmp_path.iterdir()) == [path]


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    names = ["é" * 127, "é" * 126 + "x", "robin"]
    cut = [short(name) for name in names]
    assert cut[2] == "robin"
    assert len(set(cut)) == 3
    for name in cut:
        with whole(tmp_path / f"{name}.jpg") as path:
            path.write_text(name)
