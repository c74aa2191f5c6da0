"""How time, FLOPs and memory are measured.

Time is divided by a floor: the number of images that passed the model, counted by a hook, times the time per image of a
plain pass of the same model, eager, float32, at its best batch size. Work and floor run in turn, pair by pair, so that
slow minutes of the machine affect both. The results are the median and the quartiles of the ratios of the pairs. FLOPs
are counted. Memory is the growth of the peak resident set in a fresh process.
"""

import argparse
import gc
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from interp_models.core.files import write_json
from interp_models.core.passes import are_counted
from interp_models.core.scoring import logits_of
from interp_models.data.base import decode_image
from interp_models.data.part_birds.dataset import PartBirds
from interp_models.data.transforms import transform_of
from interp_models.nn.backbone import BUNDLED, bundled_weights

RESULTS = Path(__file__).parent / "results"
STUDIES = RESULTS.parents[1] / "studies" / "results"
"""Folder of the results of `studies`."""
BATCHES = (2, 4, 8, 16, 32)
"""Batch sizes that are tried."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

Work = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Timing:
    """One row of results: the time of a work ÷ that of its floor."""

    what: str
    floor: str
    """What the floor counts, in words."""
    passes: float | None
    """Passes per image that the work made, as counted."""
    flops: float | None
    """FLOPs of the work ÷ FLOPs of the floor."""
    ratio: Summary
    repeats: int
    """Calls of the work within one measurement."""
    pairs: list[tuple[float, float]]
    """Seconds of (work, floor)."""


@dataclass(frozen=True)
class Memory:
    """One row of results: peak memory at some amount of work."""

    what: str
    amount: str
    mib: float


@dataclass(frozen=True)
class Value:
    """One row of results: a number with its unit."""

    what: str
    value: float
    unit: str


Row = Timing | Memory | Value


def interleaved(
    work: Work, floor: Work, pairs: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, float]]:
    """Seconds of (work, floor), called in turn: work, floor, work, floor, ..."""
    seconds = []
    for _ in range(pairs):
        start = clock()
        work()
        middle = clock()
        floor()
        seconds.append((middle - start, clock() - middle))
    return seconds


def summary(pairs: Sequence[tuple[float, float]]) -> Summary:
    """Median and quartiles of work ÷ floor.

    >>> summary([(1.0, 1.0), (3.0, 1.0), (2.0, 1.0)])
    Summary(median=2.0, q1=1.5, q3=2.5)
    """
    q1, middle, q3 = np.percentile([work / floor for work, floor in pairs], [25, 50, 75])
    return Summary(float(middle), float(q1), float(q3))


@dataclass
class Passes:
    """Number of images that passed a model, and of its calls."""

    images: int = 0
    calls: int = 0


@contextmanager
def count_passes(model: nn.Module) -> Iterator[Passes]:
    """Counts the images that pass the model, while the context is open."""
    passes = Passes()

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if are_counted():
            passes.images += len(args[0])
            passes.calls += 1

    count.changes_nothing = True  # type: ignore[attr-defined]  # else layers would be found anew
    handle = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def flops(work: Work) -> int:
    """FLOPs of the convolutions and matrix products of a work; torch counts no others."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def chain(model: nn.Module, images: Tensor, passes: int, batch: int, *, gradient: bool = False) -> tuple[Work, float]:
    """Plain passes in whole batches, at least `passes` of them.

    With `gradient` every pass also computes the gradient of the first class's score with respect to the images.

    Returns:
        The work; and `passes` ÷ the passes that it makes, by which its time is to be multiplied.
    """
    made = -(-passes // batch) * batch
    inputs = images[torch.arange(batch) % len(images)].contiguous()

    def run() -> None:
        with torch.set_grad_enabled(gradient):
            for _ in range(made // batch):
                x = inputs.clone().requires_grad_(gradient)
                output = model(x)
                if gradient:
                    torch.autograd.grad(logits_of(output)[:, 0].sum(), x)

    return run, passes / made


def batch_times(
    model: nn.Module,
    images: Tensor,
    sizes: Sequence[int] = BATCHES,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    *,
    gradient: bool = False,
) -> dict[int, float]:
    """Seconds per image of a plain pass by batch size: the median over rounds of equally many images each."""
    chains = {size: chain(model, images, max(sizes), size, gradient=gradient) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size, (run, scale) in chains.items():
            start = clock()
            run()
            if number:  # the first round warms up
                seconds[size].append((clock() - start) * scale / max(sizes))
    return {size: median(values) for size, values in seconds.items()}


@dataclass
class Bench:
    """Compares works on a model in eval mode with passes of the model at its best batch size.

    Args:
        model: the model.
        images: (B, 3, H, W).
        pairs: number of measurements of work and floor.
        seconds: the work is repeated until a measurement takes about this long.
        clock: wall time or CPU time of the process.
        sizes: batch sizes that are tried.
        gradient: passes of the floor compute gradients of the images too.
    """

    model: nn.Module
    images: Tensor
    pairs: int = 7
    seconds: float = 1.0
    clock: Callable[[], float] = time.perf_counter
    sizes: Sequence[int] = BATCHES
    gradient: bool = False
    times: dict[int, float] = field(init=False)
    """Seconds of a pass by batch size."""

    def __post_init__(self) -> None:
        self.model.eval()
        rounds = max(1, min(5, self.pairs))
        self.times = batch_times(self.model, self.images, self.sizes, rounds, self.clock, gradient=self.gradient)

    @property
    def batch(self) -> int:
        """The best batch size."""
        return min(self.times, key=lambda size: self.times[size])

    def compare(self, what: str, floor: str, work: Work, scale_passes: int | None = None) -> Timing:
        """Measure a work that passes images through the model.

        Args:
            what: name of the work.
            floor: what the floor counts, in words.
            work: the work. It is called once before, to count its passes and FLOPs and to warm up.
            scale_passes: passes of the floor, for a work that makes none.
        """
        work_flops = None
        with count_passes(self.model) as passes:
            if self.gradient:  # torch's counter fails on gradients of inputs alone
                work()
            else:
                work_flops = flops(work)
        count = scale_passes or passes.images
        repeats = max(1, round(self.seconds / (count * self.times[self.batch])))
        chained, scale = chain(self.model, self.images, repeats * count, self.batch, gradient=self.gradient)
        seconds = interleaved(repeated(work, repeats), chained, self.pairs, self.clock)
        seconds = [(a, b * scale) for a, b in seconds]
        return Timing(
            what,
            floor,
            passes=passes.images / len(self.images),
            flops=None if work_flops is None else work_flops / (count * self.pass_flops()),
            ratio=summary(seconds),
            repeats=repeats,
            pairs=seconds,
        )

    def pass_flops(self) -> int:
        """FLOPs of one pass of one image."""
        return flops(chain(self.model, self.images, 1, 1)[0])

    def values(self, label: str = "") -> list[Value]:
        """One row per batch size: milliseconds per image of a plain pass."""
        return [
            Value(f"one plain pass{label}, batch {size}", 1e3 * time, "ms per image")
            for size, time in self.times.items()
        ]


def repeated(work: Work, times: int) -> Work:
    """A work that calls the work `times` times."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


def peak_memory(setup: Callable[..., Work], *args: Any) -> float:
    """Memory of a work: growth of the peak resident set while `setup(*args)()` runs, in a fresh process, in MiB.

    `setup(*args)` runs before the measurement starts.

    Args:
        setup: a function of a module that returns the work.
        args: values that can be pickled.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_growth, setup, args, torch.get_num_threads()).result() / 2**20


def _growth(setup: Callable[..., Work], args: tuple[Any, ...], threads: int) -> int:
    """Bytes."""
    torch.set_num_threads(threads)
    work = setup(*args)
    gc.collect()
    peak: Callable[[], int] = _peak_of_linux
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    except OSError:  # not Linux, or not allowed: the peak since the start hides growth below it
        peak = _peak_since_start
    before = peak()
    work()
    return peak() - before


def _peak_of_linux() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _peak_since_start() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def imagenet_network() -> nn.Module:
    """EfficientNet-Lite0 for images in [0, 1]: timm's model with ImageNet weights, after a normalisation."""
    network = timm.create_model(BUNDLED)
    state = torch.load(bundled_weights(BUNDLED), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return nn.Sequential(v2.Normalize([0.5] * 3, [0.5] * 3), network).eval()


def tiny_model(classes: int = 10) -> nn.Module:
    """A network so small that thousands of passes at 224 pixels take seconds, to measure the memory of methods."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    ).eval()


def parser(description: str | None, *, model: bool = True, memory: Sequence[int] = ()) -> argparse.ArgumentParser:
    """The command line options that benchmarks share.

    Args:
        description: description of the benchmark.
        model: whether it passes images through a model.
        memory: amounts of work at which it measures memory.
    """
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--count", type=int, default=8, help="number of images")
    p.add_argument("--size", type=int, default=224, help="side of the images")
    if model:
        p.add_argument("--images", default="part_birds", help="folder of jpg files, or 'part_birds', or 'noise'")
        p.add_argument("--source", help="name of the images of a folder in the results")
        p.add_argument("--pairs", type=int, default=7, help="number of measurements of work and floor")
        p.add_argument("--seconds", type=float, default=1.0, help="short work is repeated for about this long")
        p.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="wall time, or CPU time of the process")
    if memory:
        p.add_argument(
            "--memory", type=int, nargs="*", default=list(memory), help="amounts of work at which memory is measured"
        )
        p.add_argument("--batch", type=int, help="images per pass of the work; default: the package's choice")
    return _with_common(p)


def plain_parser(description: str | None, out: Path = RESULTS) -> argparse.ArgumentParser:
    """The options that all benchmarks share, with a description that keeps its line breaks."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = _with_common(argparse.ArgumentParser(description=description, formatter_class=formatter))
    p.set_defaults(out=out)
    return p


def _with_common(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    code()  # before hours of work, during which there may be commits
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    p.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return p


def parse(p: argparse.ArgumentParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and set threads and seed. Adds `command`, a command line that repeats them without paths."""
    args = p.parse_args(argv)
    words = [f"python -m benchmarks.{name}"]
    for key, value in vars(args).items():
        if key in ("out", "source") or (value == p.get_default(key) and key not in ("pairs", "threads")):
            continue
        if key == "images" and value != "noise":
            value = "FOLDER"
        words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    args.command = " ".join(words)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def load_images(args: argparse.Namespace) -> tuple[Tensor, str]:
    """The images (B, 3, size, size) in [0, 1], and their description."""
    if args.images == "noise":
        return torch.rand(args.count, 3, args.size, args.size), f"{args.count} images of noise"
    if args.images == "part_birds":
        birds = PartBirds(split="test", image_size=args.size, seed=args.seed)
        images = [birds.load(number).image.as_subclass(Tensor) for number in range(args.count)]
        return torch.stack(images).float() / 255, f"{args.count} drawn images (part_birds)"
    files = Path(args.images).expanduser().rglob("*")
    paths = sorted(path for path in files if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(paths) < args.count:
        raise SystemExit(f"--images: {args.count} jpg files are needed, the folder holds {len(paths)}")
    transform = transform_of("crop_flip_jitter", args.size).evaluation()
    chosen = [paths[number * len(paths) // args.count] for number in range(args.count)]
    images = [transform.forward(decode_image(path)).as_subclass(Tensor) for path in chosen]
    return torch.stack(images), f"{args.count} images of {args.source or 'a folder'}, {len(paths)} jpg files"


def provenance(name: str, args: argparse.Namespace, images: str) -> dict[str, Any]:
    """How results were made: command, seed, commit, date, versions and machine, without paths of the machine."""
    return {
        "name": name,
        "command": args.command,
        "seed": args.seed,
        **code(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "images": images,
    }


@cache
def code() -> dict[str, Any]:
    """The commit and whether files differ from it, when this was called first: at the start, with the options."""
    # changed results and pages do not change what is measured
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)*/results", ":(exclude)docs")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed)}


def _git(*args: str) -> str | None:
    """The output of git; None without a repository."""
    try:
        run = subprocess.run(["git", *args], cwd=RESULTS.parents[1], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write(
    name: str, args: argparse.Namespace, images: str, rows: Sequence[Row], more: Mapping[str, Any] | None = None
) -> Path:
    """Write `<name>.json`: the provenance, the keys of `more` and the rows. Returns its path."""
    kinds = {"timings": Timing, "memory": Memory, "values": Value}
    results = provenance(name, args, images) | dict(more or {})
    results |= {kind: [_rounded(asdict(row)) for row in rows if isinstance(row, cls)] for kind, cls in kinds.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{name}.json"
    write_json(path, results)
    return path


def _rounded(value: Any) -> Any:
    """The value with numbers rounded to five digits, also in containers."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
