"""Whether trainings of prototype models that are killed (SIGKILL) and resumed end like uninterrupted ones.

python -m benchmarks.prototype_interruptions --kills 5

Tiny trainings of ProtoPNet and ProtoTree are killed --kills times in every phase, in every action at a phase's end,
while epochs are saved, and while they resume. All weights and buffers of both checkpoints and metrics.csv are compared,
exactly. The killed process runs `train.py` and notes what it does next. `train.py` itself finishes the training.
"""

import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Row, Value, plain_parser, write
from benchmarks.interruptions import same_table, same_weights
from benchmarks.tables import show
from interp_models.commands.cli import run_script
from interp_models.models.protopnet import ProtoPNet
from interp_models.models.prototree import ProtoTree
from interp_models.prototypes import push as projection
from interp_models.runs.config import TrainConfig
from interp_models.training import loggers
from interp_models.training.checkpoints import WholeCheckpointIO
from interp_models.training.module import InterpModule

SHARED: dict[str, Any] = {
    "data": {
        "dataset": {"name": "part_birds", "train_per_class": 4, "test_per_class": 1, "image_size": 64},
        "image_size": 64,
        "batch_size": 6,
        "num_workers": 0,
        "val_fraction": 0.25,
    },
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    "logger": {"wandb": "disabled"},
    "attention": {"every_n_epochs": 0},
}
EPOCHS, STEPS = 3, 6
"""Epochs of every phase, and steps of every epoch."""
LR = 3e-3
MODELS: dict[str, dict[str, Any]] = {
    "protopnet": {
        "model": {
            "name": "protopnet",
            "prototypes_per_class": 2,
            "channels": 16,
            "last_layer_steps": 500,
            **InterpModule.small,
        },
        "phases": [
            {
                "name": "warm",
                "epochs": EPOCHS,
                "lrs": {"add_on": LR, "prototypes": LR},
                "on_end": ["reset_optimizer"],
                "select": "none",
            },
            {
                "name": "joint",
                "epochs": EPOCHS,
                "lrs": {"backbone": LR, "add_on": LR, "prototypes": LR},
                "on_end": ["push", "fit_last_layer"],
                "select": "last",
            },
            {"name": "last", "epochs": EPOCHS, "lrs": {"last_layer": LR}, "eval_modules": ["backbone"]},
        ],
    },
    "prototree": {
        "model": {"name": "prototree", "depth": 4, "channels": 16, "prune_factor": 1.03, **InterpModule.small},
        "phases": [
            {"name": "freeze", "epochs": EPOCHS, "lrs": {"add_on": LR, "prototypes": LR}, "select": "none"},
            {
                "name": "all",
                "epochs": EPOCHS,
                "lrs": {"backbone": LR, "add_on": LR, "prototypes": LR},
                "schedule": "cosine",
                "on_end": ["prune", "project"],
                "select": "last",
            },
        ],
    },
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])
"""What is killed is forked from a server that has imported it once."""
SEARCH, SAVE = 0.2, 0.02
"""Seconds that the launcher waits before and after the search for patches, and before and after a file is written."""

START = -1
"""Epoch of what happens before the first one of a process."""

Moment = tuple[int, str, float]
"""Epoch, what is noted, and seconds after that."""


def launch(notes: str, *arguments: str) -> int:
    """Run `train.py`. Writes lines `<epoch> <phase> <what>` to a file before each thing it does, and after some."""
    from interp_models.commands import train

    where = f"{START} start"

    def note(what: str) -> None:
        with Path(notes).open("a") as file:
            file.write(f"{where} {what}\n")

    def noted(function: Callable[..., Any], what: Callable[..., str], seconds: float = 0.0) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            nonlocal where
            if isinstance(args[0], InterpModule):
                where = f"{args[0].current_epoch} {args[0].recipe.at(args[0].current_epoch)[0].name}"
            note(what(*args))
            time.sleep(seconds)
            result = function(*args, **options)
            if seconds:
                note(f"{what(*args)}, done")
                time.sleep(seconds)
            return result

        return run

    changes: list[tuple[Any, str, Callable[..., str], float]] = [
        (InterpModule, "training_step", lambda model, batch, number: f"step {number}", 0.0),
        (InterpModule, "validation_step", lambda *_: "validation", 0.0),
        (InterpModule, "test_step", lambda *_: "test", 0.0),
        *((ProtoPNet, name, lambda *_, name=name: name, 0.0) for name in ("push", "fit_last_layer")),
        *((ProtoTree, name, lambda *_, name=name: name, 0.0) for name in ("prune", "project")),
        (projection, "nearest_patches", lambda *_: "search for patches", SEARCH),
        (loggers, "write_whole", lambda *_: "writing metrics.csv", SAVE),
        (WholeCheckpointIO, "save_checkpoint", lambda io, checkpoint, path, *_: f"saving {Path(path).name}", SAVE),
    ]
    for owner, name, what, seconds in changes:
        setattr(owner, name, noted(getattr(owner, name), what, seconds))
    return run_script(train.__doc__, TrainConfig, train.main, arguments)


def moments(phases: Sequence[dict[str, Any]], kills: int, draw: random.Random) -> dict[str, list[Moment]]:
    """When to kill, in order, by the part of the training that is to be hit."""
    found: dict[str, list[Moment]] = {}
    for number, phase in enumerate(phases):
        last = (number + 1) * EPOCHS - 1
        epochs = sorted(draw.choices(range(last - EPOCHS + 1, last), k=kills))
        steps = [(epoch, f"step {draw.randrange(STEPS)}", draw.uniform(0, 0.2)) for epoch in epochs]
        found[f"phase {phase['name']}"] = steps
        for action in phase.get("on_end", ()):
            if action in ("push", "project"):
                sides = ("search for patches", "search for patches, done")
                found[action] = [(last, draw.choice(sides), draw.uniform(0, 2 * SEARCH)) for _ in range(kills)]
            elif action == "fit_last_layer":
                found[action] = [(last, action, draw.uniform(0, 0.1)) for _ in range(kills)]
    ends = ("saving last.ckpt", "saving last.ckpt, done")
    epochs = sorted(draw.sample(range(len(phases) * EPOCHS), k=min(kills, len(phases) * EPOCHS)))
    found["saving"] = [(epoch, draw.choice(ends), draw.uniform(0, 2 * SAVE)) for epoch in epochs]
    again = [(START, "writing metrics.csv", draw.uniform(0, 2 * SAVE)) for _ in range(kills)]
    found["resuming"] = [(EPOCHS, "step 0", 0.0), *again]
    return found


def kill_at(moment: Moment, notes: Path, arguments: Sequence[str]) -> tuple[str, float]:
    """Launch a training and kill it at a moment.

    Returns:
        Phase, epoch and the last thing that it noted; and the seconds that it lived.
    """
    epoch, what, seconds = moment
    notes.unlink(missing_ok=True)
    begin = time.monotonic()
    process = CONTEXT.Process(target=launch, args=(str(notes), *arguments))
    process.start()
    while not _reached(notes, epoch, what):
        if not process.is_alive():
            raise SystemExit(f"train.py {' '.join(arguments)}: ended before {what} of epoch {epoch}")
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()
    now, phase, did = _lines(notes)[-1]
    return f"phase {phase}, epoch {now}, {did}", time.monotonic() - begin


def _reached(notes: Path, epoch: int, what: str) -> bool:
    """Whether this, or anything of a later epoch, was noted."""
    return any(int(now) > epoch or (int(now) == epoch and did == what) for now, _, did in _lines(notes))


def _lines(notes: Path) -> list[list[str]]:
    """Epoch, phase and what was done, by line."""
    return [line.split(" ", 2) for line in (notes.read_text() if notes.exists() else "").splitlines()]


def run_to_end(arguments: list[str]) -> None:
    """Run `train.py` to its end."""
    subprocess.run([sys.executable, "train.py", *arguments], stdout=subprocess.DEVNULL, check=True)


def measure(kills: int, seed: int) -> list[Row]:
    """All rows; prints what each kill has hit."""
    draw = random.Random(seed)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            file, notes, whole = Path(folder, f"{name}.yaml"), Path(folder, "notes"), Path(folder, name, "whole")
            file.write_text(yaml.safe_dump(SHARED | config))
            run_to_end([str(file), f"out={whole}"])
            hits: Counter[str] = Counter()
            for number, (target, when) in enumerate(moments(config["phases"], kills, draw).items()):
                run = Path(folder, name, str(number))
                killed: list[tuple[str, float]] = []
                for moment in when:
                    arguments = [f"resume={run}"] if (run / "config.yaml").exists() else [str(file), f"out={run}"]
                    killed.append(kill_at(moment, notes, arguments))
                    print(f"{name}, {target}: killed after {killed[-1][1]:.1f} s in {killed[-1][0]}", flush=True)
                run_to_end([f"resume={run}"])
                rows += [Value(f"{name}, killed in {hit}", seconds, "s") for hit, seconds in killed]
                hits.update(hit.split(", ")[0] for hit, _ in killed)
                for what, same in (("weights", same_weights(whole, run)), ("metrics.csv", same_table(whole, run))):
                    print(f"{name}, {target}: {what} {'as' if same else 'NOT as'} left alone", flush=True)
                    row = f"{name}, killed {len(killed)} times in {target}: {what} as left alone"
                    rows.append(Value(row, float(same), "(1: yes)"))
            rows += [Value(f"{name}, kills in {phase}", count, "kills") for phase, count in hits.items()]
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `prototype_interruptions.json`."""
    p = plain_parser(__doc__)
    p.add_argument("--kills", type=int, default=5, help="kills in each part of a training")
    args = p.parse_args(argv)
    args.command = f"python -m benchmarks.prototype_interruptions --kills {args.kills}"
    return write("prototype_interruptions", args, "drawn images (part_birds)", measure(args.kills, args.seed))


if __name__ == "__main__":
    print(show(main()))
