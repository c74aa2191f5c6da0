"""Runs everything on a GPU: does it work, does it equal the CPU, what does it cost in time and memory.

python -m benchmarks.gpu                                  all of it, for at most --deadline seconds
python -m benchmarks.gpu --sections agreement training    parts of it
python -m benchmarks.gpu --device cpu --tiny              a rehearsal without a GPU

Sections, in this order: `agreement` (explainers, metrics and prepared copies equal the CPU's, in float32 without TF32),
`training` (a training of every model equals the CPU's, also resumed, and in bfloat16), `evaluation` (`evaluate.py`),
`training_costs` (images/s beside the bare backbone), `judging_costs` (time ÷ floor of explainers and metrics),
`compiled` (both with torch.compile), `more_agreement` (explainers of the models that the first section left out).
`--sections` chooses sections and their order. Weights are random, images are drawn, nothing is downloaded. A failure is
recorded and the other items go on. Results are written after every item. The exit code is 1 if something failed or
differs from the CPU.
"""

import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_agreement, gpu_costs
from benchmarks.gpu_agreement import Check, Sizes
from benchmarks.harness import Memory, Row, Timing, parse, plain_parser, write

SECTIONS = {
    "agreement": gpu_agreement.agreement,
    "training": gpu_agreement.training,
    "evaluation": gpu_agreement.evaluation,
    "training_costs": gpu_costs.training,
    "judging_costs": gpu_costs.judging,
    "compiled": gpu_costs.compiled,
    "more_agreement": gpu_agreement.more_agreement,
}
FRAMES = 4
"""Lines of a traceback that are kept, from its end."""

Item = tuple[str, Callable[[], Iterable[Row | Check]]]


@dataclass(frozen=True)
class Failure:
    """An item that failed or took too long."""

    what: str
    error: str
    trace: list[str]


@dataclass
class Found:
    """The results of all items."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Items that were not run: time was up."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by item."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """Warnings by item."""

    @property
    def wrong(self) -> list[Check]:
        """Checks whose difference is larger than their tolerance."""
        return [check for check in self.checks if not check.right]


class OutOfTime(BaseException):
    """An item has taken too long. Not an `Exception`, so that no `except Exception` hides it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the body after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(items: Iterable[Item], end: float, longest: float, keep: Callable[[Found], object]) -> Found:
    """Run the items in turn. An item that fails or takes too long does not affect the others.

    Args:
        items: name and work. The work yields rows one by one; rows of an item that fails later are kept.
        end: time at which all items must have ended, by `time.monotonic`.
        longest: seconds that one item may take.
        keep: called with the results after every item.
    """
    found = Found()
    for what, work in items:
        begin = time.monotonic()
        if begin >= end:
            found.left.append(what)
            continue
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught, within(min(longest, end - begin)):
                warnings.simplefilter("default")
                for row in work():
                    (found.checks if isinstance(row, Check) else found.rows).append(row)  # type: ignore[arg-type]
                    print(_line(row), flush=True)
        except OutOfTime:
            found.failures.append(Failure(what, f"stopped after {time.monotonic() - begin:.0f} s", []))
        except Exception as error:
            lines = traceback.format_exception(error)[-FRAMES:]
            found.failures.append(Failure(what, f"{type(error).__name__}: {str(error)[:500]}", lines))
        if found.failures and found.failures[-1].what == what:
            failure = found.failures[-1]
            print(f"FAILED {what}: {failure.error}\n{''.join(failure.trace)}", flush=True)
        found.seconds[what] = time.monotonic() - begin
        if messages := list(dict.fromkeys(str(warning.message)[:300] for warning in caught)):
            found.warnings[what] = messages[:5]
        keep(found)
    keep(found)
    return found


def _line(row: Row | Check) -> str:
    if isinstance(row, Check):
        return f"{'ok   ' if row.right else 'WRONG'} {row.what}: {row.apart:.2g} (at most {row.tolerance:.2g})"
    if isinstance(row, Timing):
        return f"      {row.what} ÷ {row.floor}: {row.ratio.median:.3f}"
    if isinstance(row, Memory):
        return f"      {row.what}, {row.amount}: {row.mib:.0f} MiB"
    return f"      {row.what}: {row.value:.4g} {row.unit}"


def main(argv: Sequence[str] | None = None) -> tuple[Path, Found]:
    """Measure and write the results."""
    p = plain_parser(__doc__)
    p.add_argument("--device", default="cuda", help="device of torch")
    p.add_argument("--tiny", action="store_true", help="a few items of each section, at the smallest size")
    p.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help="sections in this order; default: all",
    )
    p.add_argument("--only", default="", metavar="REGEX", help="only items whose names match")
    p.add_argument("--deadline", type=float, default=420.0, help="seconds for everything except the imports")
    p.add_argument("--longest", type=float, default=90.0, help="seconds for one item")
    args = parse(p, "gpu", argv)
    end = time.monotonic() + args.deadline
    sizes = Sizes.tiny(args.device, args.seed) if args.tiny else Sizes(args.device, args.seed)
    items = (item for name in args.sections for item in SECTIONS[name](sizes) if re.search(args.only, item[0]))

    def keep(found: Found) -> Path:
        return write("gpu", args, f"drawn images (part_birds), random weights, {_device(args.device)}", found.rows, {
            "checks": [asdict(check) | {"right": check.right} for check in found.checks],
            "failures": [asdict(failure) for failure in found.failures],
            "left": found.left,
            "seconds": found.seconds,
            "warnings": found.warnings,
        })  # fmt: skip

    found = run(items, end, args.longest, keep)
    for check in found.wrong:
        print(_line(check))
    for failure in found.failures:
        print(f"FAILED {failure.what}: {failure.error}")
    print(
        f"{len(found.checks)} checks, {len(found.wrong)} wrong, {len(found.failures)} failed, "
        f"{len(found.left)} not run (time was up), {sum(found.seconds.values()):.0f} s"
    )
    return keep(found), found


def _device(device: str) -> str:
    if torch.device(device).type != "cuda":
        return device
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, cuDNN {torch.backends.cudnn.version()}"


if __name__ == "__main__":
    _, result = main()
    sys.exit(bool(result.wrong or result.failures))
