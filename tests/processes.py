"""The scripts in processes of their own that can be killed, forked from a server that has imported them once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["interp_models.runs.train", "interp_models.runs.evaluate", "interp_models.nn.backbone"])


class DieAt(pl.Callback):
    """Ends the process without any farewell, as a power cut does, before a batch of a training."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.moment = (epoch, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.moment:
            os._exit(9)


def start(script: str, arguments: list[str], log: Path, die_at: tuple[int, int] | None = None) -> Any:
    """Start train.py or evaluate.py; its outputs go to a file."""
    process = CONTEXT.Process(target=_main, args=(script, arguments, str(log), die_at, torch.get_num_threads()))
    process.start()
    return process


def run(script: str, arguments: list[str], log: Path, die_at: tuple[int, int] | None = None) -> int | None:
    """Run train.py or evaluate.py to its end; returns the exit code."""
    process = start(script, arguments, log, die_at)
    process.join()
    return process.exitcode  # type: ignore[no-any-return]


def run_ranks(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run `work(rank, folder, *args)` on two ranks that meet in a folder, and see that both come to their end."""
    ranks = [CONTEXT.Process(target=_rank, args=(work, rank, folder, args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(work: Callable[..., None], rank: int, folder: Path, args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    work(rank, folder, *args)
    dist.destroy_process_group()


def _main(script: str, arguments: list[str], log: str, die_at: tuple[int, int] | None, threads: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(threads)
    # Workers that load images begin as they do for users; by the server they would need seconds, and outlive a SIGKILL.
    multiprocessing.set_start_method("fork", force=True)
    from interp_models.commands import evaluate, train
    from interp_models.training.attention_logger import AttentionLogger

    if die_at is not None:
        AttentionLogger.of = lambda config, run: [DieAt(*die_at)]  # type: ignore[assignment,list-item,method-assign]
    sys.argv = [f"{script}.py", *arguments]
    code = {"train": train, "evaluate": evaluate}[script].script()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
