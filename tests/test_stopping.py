"""What is left, said and returned when a signal stops a script."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from interp_models.commands.cli import run_script
from interp_models.core import stopping
from interp_models.core.stopping import Stopped, goes_on_by, stop_of
from interp_models.runs.config import TrainConfig
from tests import processes
from tests.conftest import QUICK_EVALUATION, Cub, copy_run, tiny_config, write_config

ROOT = Path(__file__).parents[1]
LONG = [{"epochs": 500, "lrs": {"backbone": 1e-3, "attention": 1e-3, "head": 1e-3}}]


@pytest.fixture(autouse=True)
def _signals_arrive() -> Iterator[None]:
    """A shell's background jobs and nohup ignore signals, and so do their children."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(path: Path, process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None, path
        time.sleep(0.02)


def last_line(log: Path) -> str:
    lines = log.read_text().splitlines()
    assert "Traceback" not in lines
    return lines[-1]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_training_stops_and_says_how_to_go_on(tiny_cub: Cub, tmp_path: Path, number: signal.Signals) -> None:
    run, log = tmp_path / "my run", tmp_path / "log"
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root, out=str(run), phases=LONG))
    process = processes.start("train", [str(config)], log)
    wait_for(run / "checkpoints/last.ckpt", process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert (
        last_line(log)
        == f"stopped by {number.name}; python train.py 'resume={run}' goes on with epoch {last['epoch'] + 1}"
    )
    assert not (run / "metrics.json").exists()
    assert not list(run.rglob("*.partial"))
    if number == signal.SIGTERM:
        more = f"phases[0].epochs={last['epoch'] + 2}"
        assert processes.run("train", [f"resume={run}", more], log) == 0, log.read_text()
        assert (run / "metrics.json").is_file()


def test_before_the_first_epoch_is_done(tiny_cub: Cub, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = tiny_config(tiny_cub.root, out=str(run), phases=LONG)
    config["data"]["num_workers"] = 1  # whose process is to end with the script's, silently
    process = processes.start("train", [str(write_config(tmp_path / "c.yaml", config))], log)
    wait_for(run / "config.yaml", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert last_line(log) == f"stopped by SIGTERM; python train.py resume={run} goes on with epoch 0"
    assert processes.run("train", [f"resume={run}", "phases[0].epochs=1"], log) == 0, log.read_text()


def test_an_evaluation_stops_and_goes_on(bcnn_run: Path, tmp_path: Path) -> None:
    run, log = copy_run(bcnn_run, tmp_path / "run"), tmp_path / "log"
    arguments = [str(run), *QUICK_EVALUATION, "explainers=[{name: rise, masks: 4000}]", "batch_size=1"]
    process = processes.start("evaluate", arguments, log)
    wait_for(run / "evaluation/.partial", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert last_line(log).endswith("stopped by SIGINT; repeat the command to go on")
    assert not (run / "evaluation/results.json").exists()


def raising(number: int, way: str) -> Any:
    """A script that a signal stops, and that makes another error of it."""

    def run(positional: list[str], overrides: list[str]) -> None:
        goes_on_by(lambda: "do it again")
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Stopped as error:
            if way == "another error":
                raise RuntimeError("of the library") from None
            if way == "exit":
                sys.exit(1)
            raise error

    return run


@pytest.mark.parametrize("way", ["as it is", "another error", "exit"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_code_is_the_signals_whatever_is_made_of_it(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, way: str
) -> None:
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    assert run_script("", TrainConfig, raising(number, way), []) == code
    assert capsys.readouterr().err == f"stopped by {number.name}; do it again\n"
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before


def test_what_no_signal_stopped_is_no_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def run(positional: list[str], overrides: list[str]) -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_script("", TrainConfig, run, [])
    assert stop_of(RuntimeError()) is None
    assert run_script("", TrainConfig, lambda positional, overrides: None, []) == 0
    assert capsys.readouterr().err == ""


def test_an_ignored_signal_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = []

        def run(positional: list[str], overrides: list[str]) -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            done.append(True)

        assert run_script("", TrainConfig, run, []) == 0
        assert done == [True]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_is_left_behind(tiny_cub: Cub, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root, out=str(run), phases=LONG))
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), str(config), *two], stdout=log, stderr=log, cwd=tmp_path
        )
    wait_for(run / "checkpoints/last.ckpt", process, 300)
    assert len(of_config(config)) == 2
    process.send_signal(number)
    code = process.wait(60)
    end = time.monotonic() + 20
    while of_config(config) and time.monotonic() < end:
        time.sleep(0.2)
    assert of_config(config) == []
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert last_line(tmp_path / "log").startswith(
            f"stopped by {number.name}; python {ROOT / 'train.py'} resume={run} goes on with epoch "
        )


def of_config(config: Path) -> list[int]:
    """Processes with a config among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(config).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_signal_that_meets_a_destructor_is_not_lost() -> None:
    """Python prints an exception of a destructor and goes on."""

    class Dies:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)  # so that the handler runs here

    def die_and_wait() -> None:
        Dies()
        for _ in range(100):
            time.sleep(0.05)

    with pytest.raises(Stopped, match="SIGTERM"), stopping.stoppable():
        die_and_wait()
