"""Everything on a GPU: does it work, does it give the CPU's numbers, what does it cost in time and memory.

python -m benchmarks.gpu                                  all of it, at most --deadline seconds
python -m benchmarks.gpu --sections agreement training    parts of it
python -m benchmarks.gpu --device cpu --tiny              a rehearsal without a GPU

Sections, in this order: `agreement` (explainers, metrics, prepared copies: against the CPU, float32 without TF32),
`training` (a run of every model against the CPU's, resumed, and in bfloat16), `evaluation` (`evaluate.py`),
`training_costs` (images/s beside the bare backbone), `judging_costs` (time ÷ floor of explainers and metrics),
`compiled` (both, by torch.compile), `more_agreement` (explainers of the models that the first section left out).
`--sections` gives another order.
Weights are random, images are drawn, nothing is downloaded. An item that fails is recorded, and the rest goes on; the
results are written after every item. Exit code 1 says that something failed or differs from the CPU.
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
"""Of a traceback, the last ones."""

Item = tuple[str, Callable[[], Iterable[Row | Check]]]


@dataclass(frozen=True)
class Failure:
    """An item that did not come to its end."""

    what: str
    error: str
    trace: list[str]


@dataclass
class Found:
    """What all items gave."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Items that there was no time for."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of every item."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What items warned of."""

    @property
    def wrong(self) -> list[Check]:
        """Checks that are apart by more than their tolerance."""
        return [check for check in self.checks if not check.right]


class OutOfTime(BaseException):
    """An item has taken too long; no `except Exception` on its way hides it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body after so many seconds."""

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
    """Do the items in turn, each by itself: one that fails or takes too long leaves the rest alone.

    Args:
        items: name and work, which yields its rows one by one; what a failed one has given is kept.
        end: of all, by `time.monotonic`.
        longest: seconds of one item.
        keep: is called after every item.
    """
    found = Found()
    for what, work in items:
        begin = time.monotonic()
        if begin >= end:
            found.left.append(what)
            continue
        told: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as told, within(min(longest, end - begin)):
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
        if messages := list(dict.fromkeys(str(warning.message)[:300] for warning in told)):
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
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="a few items of each section, of the smallest size")
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    p.add_argument("--only", default="", metavar="REGEX", help="items whose names it is found in")
    p.add_argument("--deadline", type=float, default=420.0, help="seconds for everything, but for the imports")
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
        f"{len(found.checks)} checks, {len(found.wrong)} wrong, {len(found.failures)} failed, {len(found.left)} left "
        f"for want of time, {sum(found.seconds.values()):.0f} s"
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
