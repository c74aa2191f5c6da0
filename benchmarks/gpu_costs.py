"""What training and judging cost on a device, for `benchmarks.gpu`.

Training steps use torch's defaults, on GPUs with TF32 in convolutions. Judging and its floors never use TF32. Clocks
are read after the device has finished its work. A floor counts passes of the same model as it is, in float32, at its
best batch size, and is measured in turn with the work.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks import faithfulness, posthoc
from benchmarks.gpu_agreement import Check, Sizes, birds
from benchmarks.harness import Bench, Memory, Row, Timing, Value, Work, batch_times, interleaved, repeated, summary
from interp_models.core.modes import full_float32
from interp_models.core.prepared import Preparation, Prepared, prepare
from interp_models.core.scoring import logits_of, probabilities
from interp_models.explainers import EXPLAINERS
from interp_models.models import MODELS
from interp_models.training.recipe import Phase, Recipe

Items = Iterator[tuple[str, Callable[[], Iterable[Row | Check]]]]
CLASSES = 200
ATTENTION = ("cls_attention", "rollout", "attention_gradcam", "gradsam", "chefer")
SOME = ("gradcam", "gradient", "rise", "smoothgrad")
"""One method of each kind: one pass, one with a gradient, many passes, many with gradients."""
JUDGED = 16
"""Images that metrics are timed on."""
STEPS = 5
"""Training steps in one measurement."""


def clock() -> float:
    """Seconds, read after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(what: str, amount: str, work: Work, device: str) -> Iterator[Memory]:
    """Peak memory of a work on a GPU, beyond what is allocated before; nothing on other devices."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    yield Memory(what, amount, (torch.cuda.max_memory_allocated() - before) / 2**20)


def freed() -> None:
    """Free the memory of earlier items."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autocast(device: str, precision: str) -> Any:
    """The autocast of Lightning's `precision`."""
    low = precision == "bf16-mixed"
    return torch.autocast(torch.device(device).type, torch.bfloat16) if low else nullcontext()


def step_of_ours(name: str, backbone: str, sizes: Sizes, precision: str, *, compiled: bool = False) -> Work:
    """A training step of one of our models as in `InterpModule`, without Lightning."""
    model: Any = MODELS.build(name, {"backbone": backbone, "weights": None}, num_classes=CLASSES)
    model.recipe = Recipe([Phase(lrs=dict.fromkeys(model.parameter_groups(), 1e-3))])
    model.to(sizes.device).train()
    optimizer = model.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["scale"]
    if compiled:
        model.get_submodule("backbone").compile()
    images, targets = batch(sizes)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(sizes.device, precision):
            output = model(images)
            loss = torch.stack(list(model.loss(output, targets).values())).sum()
            with torch.no_grad():
                model.observe(output, targets)
        loss.backward()
        optimizer.step()

    return step


def step_of_backbone(
    backbone: str, sizes: Sizes, precision: str, *, channels_last: bool = True, compiled: bool = False
) -> Work:
    """A training step of timm's model with a linear classifier."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    more = {"img_size": sizes.side} if "vit" in backbone else {}
    model: Any = timm.create_model(backbone, num_classes=CLASSES, **more)
    model = model.to(sizes.device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = batch(sizes)
    images = images.contiguous(memory_format=layout)
    if compiled:
        model.compile()

    def step() -> None:
        optimizer.zero_grad()
        with autocast(sizes.device, precision):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()

    return step


def batch(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Images and labels of a training step."""
    some = birds(min(sizes.batch, 16), sizes.side, sizes.seed).images
    images = some.repeat(-(-sizes.batch // len(some)), 1, 1, 1)[: sizes.batch].to(sizes.device)
    return images, torch.arange(len(images), device=sizes.device) % CLASSES


def training(sizes: Sizes) -> Items:
    """Items: training steps of the bare backbones, then of every model beside its backbone."""
    for backbone in (sizes.lite, sizes.resnet, sizes.vit):
        yield f"steps of {backbone}", partial(layouts, backbone, sizes)
    for name, backbone in models(sizes):
        for precision in ("32-true", "bf16-mixed"):
            yield f"steps of {name}, {backbone}, {precision}", partial(beside, name, backbone, precision, sizes)


def models(sizes: Sizes) -> list[tuple[str, str]]:
    """Our models with their backbones here."""
    if sizes.few:
        return [("cnn", sizes.lite), ("vit_cls", sizes.vit)]
    on_lite = [(name, sizes.lite) for name in MODELS.names() if name != "vit_cls"]
    return [("cnn", sizes.resnet), *on_lite, ("vit_cls", sizes.vit)]


def seconds(work: Work, sizes: Sizes, warm: int = 3) -> float:
    """Seconds of one call: the best of a few measurements of several calls each."""
    repeated(work, warm)()
    steps = 1 if sizes.few else STEPS
    return min(a for a, _ in interleaved(repeated(work, steps), lambda: None, sizes.pairs, clock)) / steps


def layouts(backbone: str, sizes: Sizes, *, compiled: bool = False) -> Iterator[Row]:
    """Images per second of the bare backbone, in both layouts and precisions."""
    for precision in ("32-true", "bf16-mixed"):
        for channels_last in (False, True):
            if channels_last and "vit" in backbone:
                continue
            freed()
            step = step_of_backbone(backbone, sizes, precision, channels_last=channels_last, compiled=compiled)
            kind = f"{precision}{', channels last' if channels_last else ''}{', compiled' if compiled else ''}"
            what = f"training step of {backbone}, {kind}"
            yield Value(what, sizes.batch / seconds(step, sizes), "images/s")
            yield from peak(what, f"{sizes.batch} images", step, sizes.device)


def beside(name: str, backbone: str, precision: str, sizes: Sizes, *, compiled: bool = False) -> Iterator[Row]:
    """A model's training step ÷ that of its bare backbone, images per second, and memory."""
    freed()
    bare = step_of_backbone(backbone, sizes, precision, channels_last="vit" not in backbone, compiled=compiled)
    step = step_of_ours(name, backbone, sizes, precision, compiled=compiled)
    steps = 1 if sizes.few else STEPS
    repeated(step, 3)()
    repeated(bare, 3)()
    pairs = interleaved(repeated(step, steps), repeated(bare, steps), sizes.pairs, clock)
    what = f"training step of {name}, {backbone}, {precision}{', compiled' if compiled else ''}"
    yield Timing(what, "a step of the bare backbone, channels last", None, None, summary(pairs), steps, pairs)
    yield Value(what, sizes.batch * steps / min(a for a, _ in pairs), "images/s")
    yield from peak(what, f"{sizes.batch} images", step, sizes.device)


def network(backbone: str, sizes: Sizes) -> nn.Module:
    """A classifier of images in [0, 1]: timm's model with random weights, after a normalisation."""
    torch.manual_seed(sizes.seed)
    more = {"img_size": sizes.side} if "vit" in backbone else {}
    trunk = timm.create_model(backbone, num_classes=CLASSES, **more)
    model = nn.Sequential(v2.Normalize([0.5] * 3, [0.5] * 3), trunk)
    return model.to(sizes.device).eval()


class Judging:
    """A network with its floors, each measured at its first use."""

    def __init__(self, backbone: str, sizes: Sizes) -> None:
        self.backbone, self.sizes = backbone, sizes
        self.model = network(backbone, sizes)
        some = birds(min(sizes.images, 16), sizes.side, sizes.seed).images
        self.images = some.repeat(-(-sizes.images // len(some)), 1, 1, 1)[: sizes.images].to(sizes.device)
        self.made: dict[bool, Bench] = {}

    def bench(self, count: int | None = None, *, gradient: bool = False) -> Bench:
        """A bench of so many images; the best batch size of the floor is found once for each kind of pass."""
        sizes = self.sizes
        if gradient not in self.made:
            self.made[gradient] = Bench(
                self.model, self.images, sizes.pairs, sizes.seconds, clock, sizes.batches, gradient
            )
        known = self.made[gradient]
        bench = replace(known, sizes=(known.batch,))
        bench.images = self.images[:count]
        return bench


PREPARATIONS: dict[Preparation, str] = {"none": "plain", "exact": "exact", "bfloat16": "bfloat16"}
"""Preparations that metrics are timed with, and their names in the rows."""


def judging(sizes: Sizes) -> Items:
    """Items: metrics and explainers, plain and with prepared copies; only some on the second backbone."""
    for backbone in (sizes.lite, sizes.resnet):
        some = sizes.few or backbone == sizes.resnet
        subject = cache(partial(Judging, backbone, sizes))  # made by the first item that uses it
        yield f"plain passes of {backbone}", partial(plain_passes, subject)
        for how in PREPARATIONS:
            yield f"metrics of {backbone}, {PREPARATIONS[how]}", partial(metrics, subject, how)
        for case in posthoc.cases(sizes.scale):
            if not some or case.name in SOME:
                yield f"{case.name} of {backbone}", partial(method, subject, case)
        subject.cache_clear()
        freed()
    subject = cache(partial(Judging, sizes.vit, sizes))
    yield f"plain passes of {sizes.vit}", partial(plain_passes, subject)
    for name in ATTENTION[:1] if sizes.few else ATTENTION:
        yield f"{name} of {sizes.vit}", partial(method, subject, posthoc.Case(name))
    yield f"metrics of {sizes.vit}, exact", partial(metrics, subject, "exact")


def plain_passes(made: Callable[[], Judging]) -> Iterator[Row]:
    """Milliseconds of a plain pass by batch size; with TF32 its time, and the largest difference of probabilities."""
    subject = made()
    with full_float32():
        best = subject.bench().batch
    for size, time_ in subject.made[False].times.items():
        yield Value(f"one plain pass of {subject.backbone}, batch {size}", 1e3 * time_, "ms per image")
    by_tf32 = batch_times(subject.model, subject.images, (best,), subject.sizes.pairs, clock)[best]
    yield Value(f"one plain pass of {subject.backbone} by TF32, batch {best}", 1e3 * by_tf32, "ms per image")
    with torch.no_grad():
        images = subject.images[:16]
        found = logits_of(subject.model(images)).softmax(dim=1)
        with full_float32():
            exact = logits_of(subject.model(images)).softmax(dim=1)
    away = float(((found - exact).abs() / exact).max())
    yield Value(f"probabilities of {subject.backbone} by TF32, largest difference", away, "of their size")


def metrics(made: Callable[[], Judging], how: Preparation) -> Iterator[Row | Check]:
    """All metrics on random maps, with the model prepared in one way."""
    with full_float32():
        subject = made()
        sizes, bench = subject.sizes, subject.bench(JUDGED)
        model = prepare(subject.model, bench.images, how)
        ready = how == "none" or isinstance(getattr(model, "_orig_mod", model), Prepared)
        yield Check(f"{subject.backbone}, {PREPARATIONS.get(how, how)}: not prepared", float(not ready), 0)
        cells = sizes.grid**2
        counts = {"deletion and insertion": 2 * cells, "masked confidence": 2, "all metrics": 2 * cells + 3}
        found = faithfulness.works(bench.images, probabilities(model), sizes.grid, None)
        for what, count in counts.items():
            floor, work = found[what]
            name = f"{what} of {subject.backbone}, {PREPARATIONS.get(how, how)}"
            row = bench.compare(name, f"{floor}, T = {cells}", work, count * len(bench.images))
            yield replace(row, passes=float(count))
            yield from peak(name, f"{len(bench.images)} images", work, sizes.device)


def method(made: Callable[[], Judging], case: posthoc.Case, hows: tuple[Preparation, ...] = ()) -> Iterator[Row]:
    """Time and memory of an explainer, with prepared copies too if it makes many passes."""
    with full_float32():
        subject = made()
        sizes, bench = subject.sizes, subject.bench(case.count, gradient=case.gradient)
        target = torch.zeros(len(bench.images), dtype=torch.long)
        options = case.options
        if case.name == "scorecam":
            names = dict(subject.model.named_modules())
            options = {"layer": posthoc.NARROW if posthoc.NARROW in names else "1.layer2"}
        explainer = EXPLAINERS.build(case.name, options, model=subject.model)
        work = partial(explainer.attribute, bench.images, target)
        floor = "passes there and back" if case.gradient else "passes"
        name = f"{case.name} of {subject.backbone}"
        explainer.preparation = "none"
        plain = bench.compare(f"{name}, plain", floor, work)
        assert plain.passes is not None
        yield plain
        yield from peak(f"{name}, plain", f"{len(bench.images)} images", work, sizes.device)
        for how in hows or (("exact", "bfloat16") if case.many else ()):
            explainer.preparation = how
            row = bench.compare(f"{name}, {how}", floor, work, round(plain.passes * len(bench.images)))
            yield replace(row, passes=plain.passes, flops=None)
            yield from peak(f"{name}, {how}", f"{len(bench.images)} images", work, sizes.device)


def compiled(sizes: Sizes) -> Items:
    """Items: metrics, RISE and training steps with torch.compile."""
    if sizes.few:  # not every machine has a compiler
        return
    subject = cache(partial(Judging, sizes.lite, sizes))
    yield f"metrics of {sizes.lite}, compiled", partial(metrics, subject, "compiled")
    case = next(case for case in posthoc.cases(sizes.scale) if case.name == "rise")
    yield f"rise of {sizes.lite}, compiled", partial(method, subject, case, ("compiled",))
    subject.cache_clear()
    for name, backbone in (("cnn", sizes.resnet), ("vit_cls", sizes.vit)):
        what = f"steps of {name}, {backbone}, bf16-mixed, compiled"
        yield what, partial(beside, name, backbone, "bf16-mixed", sizes, compiled=True)
