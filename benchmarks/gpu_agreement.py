"""Checks of `benchmarks.gpu` that a device equals the CPU: explainers, metrics, prepared copies, trainings.

The difference of two sets of maps is ‖a - b‖ / ‖b‖ over all maps, that of values the largest difference. Methods that
amplify rounding are checked in float64, where rounding is small. The loss of a training's first epoch must agree
closely, that of later epochs roughly: rounding grows from step to step. Random numbers are the same on all devices:
they are functions of keys.
"""

import copy
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.harness import Row, Value
from benchmarks.prototype_interruptions import MODELS as RECIPES
from benchmarks.prototype_interruptions import SHARED
from interp_models.config.loading import check
from interp_models.core.errors import NotApplicable
from interp_models.core.modes import full_float32
from interp_models.core.prepared import Prepared, prepare
from interp_models.core.scoring import logits, logits_of, probabilities
from interp_models.core.truth import Truth, in_boxes
from interp_models.data.part_birds.dataset import PartBirds
from interp_models.evaluation.config import EvaluateConfig
from interp_models.explainers import EXPLAINERS
from interp_models.metrics import METRICS, PROTOTYPE_METRICS, Case
from interp_models.metrics.presets import PRESETS
from interp_models.metrics.prototype_base import Found
from interp_models.models import MODELS
from interp_models.nn.attention import find_transformer
from interp_models.nn.dropping import PatchScores
from interp_models.runs.config import TrainConfig

CLASSES = 4
AMPLIFIES = {"kernelshap", "lime", "occlusion", "opticam", "xgradcam"}
"""Explainers that amplify rounding, by small differences of scores, Adam's steps or quotients by nearly 0.

They are checked in float64. Where a gradient is nothing but rounding, Adam makes a whole step in float32, where this
gradient is above its epsilon of 1e-8, and none in float64."""
FULLY = ("vit", "cnn")
"""Models that all explainers are checked on in `agreement`, after the first; `more_agreement` has the others."""
EXACT = {"random", "fakecam", "gt_box", "gt_background"}
MAPS, MAPS_64 = 2e-3, 1e-5
SUPERPIXELS = 0.05
"""Tolerance of lime and kernelshap: a few pixels between two segments may fall into the other one."""
VALUES, VALUES_64 = 1e-2, 1e-5
FIRST, LAST, BFLOAT16 = 2e-3, 5e-2, 5e-2
"""Relative tolerances of losses: of the first epoch, of later ones, and of the first in bfloat16."""


@dataclass(frozen=True)
class Check:
    """The difference of a device's result from the CPU's, with its tolerance."""

    what: str
    apart: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether the results agree; False for NaN."""
        return self.apart <= self.tolerance


@dataclass(frozen=True)
class Sizes:
    """The device, and the models, methods and sizes that are run on it."""

    device: str
    seed: int = 0
    subjects: tuple[str, ...] = ("resnet18", "vit", *MODELS.names())
    explainers: tuple[str, ...] = tuple(EXPLAINERS.names())
    metrics: tuple[str, ...] = tuple(METRICS.names())
    trainings: tuple[str, ...] = tuple(MODELS.names())
    judged: str = "protopnet"
    """The model that is trained and evaluated."""
    lite: str = "tf_efficientnet_lite0"
    resnet: str = "resnet50"
    vit: str = "vit_small_patch16_224"
    side: int = 224
    batch: int = 128
    """Images per training step."""
    images: int = 64
    """Images that are explained at once."""
    batches: tuple[int, ...] = (32, 64, 128, 256)
    """Batch sizes of the floor that are tried."""
    scale: int = 4
    """The scale of `posthoc.cases`."""
    grid: int = 7
    pairs: int = 3
    seconds: float = 0.1
    few: bool = False
    """Whether a few cases are run instead of all."""

    @classmethod
    def tiny(cls, device: str, seed: int) -> "Sizes":
        """Sizes of a rehearsal that takes seconds on a CPU."""
        return cls(
            device, seed, subjects=("test_resnet", "protopnet"), trainings=("protopnet",),
            explainers=("gradcam", "guided_backprop", "random", "cls_attention"),
            metrics=("deletion_insertion", "form", "patch_dropping"),
            lite="test_efficientnet", resnet="test_resnet", vit="test_vit", side=64, batch=4, images=4, batches=(2, 4),
            scale=1, grid=2, pairs=1, seconds=0.0, few=True,
        )  # fmt: skip


def tiny_model(name: str, seed: int = 1) -> nn.Module:
    """A small network with statistics like those of a trained one.

    Args:
        name: one of our models, `resnet18`, `test_resnet` or `vit`.
        seed: seed of weights and statistics.
    """
    torch.manual_seed(seed)
    if name == "resnet18":
        model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=CLASSES)
    elif name == "vit":
        model = timm.create_model("test_vit", num_classes=CLASSES, img_size=64)
    elif name == "test_resnet":
        model = timm.create_model(name, num_classes=CLASSES)
    else:
        model = MODELS.build(name, tiny_options(name), num_classes=CLASSES)
        if name == "vit_cls":  # else timm resizes the position embedding in every pass, in float32
            model.get_submodule("backbone").set_input_size((64, 64))  # type: ignore[operator]
        with torch.no_grad():  # a tree that has seen no batch scores all classes alike
            model.observe(model.eval()(torch.rand(4, 3, 64, 64)), torch.arange(4))
            if name == "prototree":
                model.leaves.mul_(100)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    if "vit" in name:
        as_trained(model)
    return model.eval()


def as_trained(vit: nn.Module) -> None:
    """Change a random vision transformer to be like a trained one: norms shift and scale, blocks have larger weights.

    As timm makes it, the norms' output has mean 0 over the channels, and the tokens have hardly a common direction. An
    activation map and the projection of Eigen-CAM are then nothing but rounding, which also differs between float32 and
    float64 on one CPU.
    """
    with torch.no_grad():
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for module in find_transformer(vit).blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(5)


@cache
def placed(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model on a device, made once; explainers and metrics do not change it."""
    return tiny_model(name).to(device, dtype)


def tiny_options(name: str) -> dict[str, Any]:
    """The options that make one of our models small, as its class says, without random numbers of the device."""
    return {**MODELS.get(name).small, **({"drop_path": 0.0} if name == "vit_cls" else {})}


@cache
def birds(count: int, size: int, seed: int) -> Found:
    """Drawn birds with labels and parts, without maps; drawn once."""
    drawn = PartBirds(split="test", image_size=size, seed=seed)
    samples = [drawn.load(number * 7 % len(drawn)) for number in range(count)]
    images = torch.stack([sample.image.as_subclass(Tensor) for sample in samples]).float() / 255
    parts = torch.stack([sample.parts.as_subclass(Tensor) for sample in samples if sample.parts is not None])
    visible = torch.stack([sample.visible for sample in samples if sample.visible is not None])
    labels = torch.arange(count) % CLASSES
    masks = torch.stack([sample.masks[0].as_subclass(Tensor) for sample in samples if sample.masks is not None])
    return Found(images, torch.empty(0), labels, torch.arange(count), parts.float(), visible, masks)


def apart(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite if the shapes differ.

    >>> apart(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0]))
    0.25
    """
    if found.shape != expected.shape:
        return float("inf")
    size = float(expected.double().norm())
    return float((found.cpu().double() - expected.cpu().double()).norm()) / (size or 1.0)


def furthest(found: Tensor, expected: Tensor) -> float:
    """The largest difference of values, relative where they are above 1; infinite if only one of two is defined."""
    a, b = found.cpu().double(), expected.cpu().double()
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    differences = ((a - b).abs() / b.abs().clamp(min=1))[~b.isnan()]
    return float(differences.max()) if len(differences) else 0.0


def agreement(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Iterable[Row | Check]]]]:
    """Items: prepared copies, metrics, and explainers of a few models."""
    first, *rest = sizes.subjects
    yield f"passes of {first}", partial(passes, first, sizes)
    for name in sizes.metrics:
        yield f"metric {name}", partial(metric, name, sizes)
    for name in sizes.explainers:
        yield f"{name} of {first}", partial(explained, name, first, sizes)
    for subject in ("protopnet", "prototree"):
        if subject in sizes.subjects:
            for name in PROTOTYPE_METRICS.names():
                yield f"{name} of {subject}", partial(prototypes, name, subject, sizes)
    for subject in rest:
        yield f"passes of {subject}", partial(passes, subject, sizes)
        if subject in MODELS.names():
            yield f"own maps of {subject}", partial(own_maps, subject, sizes)
    for subject in rest:
        if subject in FULLY:
            for name in sizes.explainers:
                yield f"{name} of {subject}", partial(explained, name, subject, sizes)


def more_agreement(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Iterable[Row | Check]]]]:
    """Items: all explainers on the other models."""
    for subject in sizes.subjects[1:]:
        if subject not in FULLY:
            for name in sizes.explainers:
                yield f"{name} of {subject}", partial(explained, name, subject, sizes)


def passes(subject: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of a model's logits and of those of its prepared copies."""
    images = birds(8, 64, sizes.seed).images
    model = tiny_model(subject)
    with torch.no_grad(), full_float32():
        expected = logits_of(model(images))
        there = copy.deepcopy(model).to(sizes.device)
        yield Check(f"{subject}, logits", apart(logits_of(there(images.to(sizes.device))), expected), 1e-4)
        for how, tolerance in (("exact", 1e-4), ("bfloat16", 5e-2)):
            made = prepare(there, images.to(sizes.device), how)  # type: ignore[arg-type]
            yield Check(f"{subject}, {how}: not prepared", float(not isinstance(made, Prepared)), 0)
            found = logits_of(made(images.to(sizes.device)))
            yield Check(f"{subject}, {how}: logits", apart(found, expected), tolerance)


def explained(name: str, subject: str, sizes: Sizes) -> Iterator[Check | Value]:
    """Check of an explainer's maps of given classes; the device must refuse exactly what the CPU refuses."""
    dtype = torch.float64 if name in AMPLIFIES else torch.float32
    expected, there = (_maps(name, subject, device, dtype, sizes) for device in ("cpu", sizes.device))
    what = f"{name} of {subject}"
    if isinstance(expected, str) or isinstance(there, str):
        yield Check(f"{what}: refused", 0.0 if expected == there else float("inf"), 0.0)
        return
    tolerance = 0.0 if name in EXACT else SUPERPIXELS if name in ("lime", "kernelshap") else MAPS
    if dtype == torch.float64 and tolerance == MAPS:
        tolerance = MAPS_64
    yield Check(what, apart(there[0], expected[0]), tolerance)
    if again := apart(there[-1], there[0]):
        yield Value(f"{what}: another call", again, "of its size apart")


def _maps(name: str, subject: str, device: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor] | str:
    """The maps, on a GPU of two calls; or the reason why the explainer does not apply."""
    given = birds(3, 64, sizes.seed)
    truth = Truth(torch.tensor([[8.0, 16.0, 40.0, 30.0]] * 3))
    options = EXPLAINERS.get(name).small
    if name == "scorecam" and "resnet" in subject:
        options = {"layer": "layer1"}  # fewer channels
    try:
        explainer = EXPLAINERS.build(name, options, model=placed(subject, device, dtype))
        images = given.images.to(device, dtype)
        calls = 1 if torch.device(device).type == "cpu" else 2
        return [explainer.attribute(images, given.label, truth).cpu() for _ in range(calls)]
    except NotApplicable as error:
        return str(error)


def own_maps(subject: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of one of our models: every kind of own map, its measures, and the maps of its pictures."""
    given, found = birds(4, 64, sizes.seed), []
    for device in ("cpu", sizes.device):
        model = placed(subject, device)
        labels = given.label.to(device)
        with torch.no_grad(), full_float32():
            output = model(given.images.to(device))
            own = {kind: model.explain(output, labels, kind) for kind in model.explanations}
            own |= {f"measured {key}": value for key, value in model.measure(output, labels).items()}
            own |= {"display": model.display(output, labels)}
            if model.additive:
                own["evidence"] = model.evidence(output, labels)
        found.append(own)
    for key, expected in found[0].items():
        yield Check(f"{subject}, {key}", apart(found[1][key], expected), MAPS)


def brightness(images: Tensor) -> Tensor:
    """A map of 7 x 7 cells that depends on the pixels alone."""
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), (7, 7))


def metric(name: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of a metric's values of random maps, under every preset."""
    given = birds(4, 64, sizes.seed)
    maps = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes, right = torch.tensor([[8.0, 16.0, 40.0, 30.0]] * 4), torch.tensor([1.0, 0.0, 1.0, 1.0])
    truth = Truth(boxes, in_boxes(boxes[:, None], (64, 64))[:, 0], None, given.parts, given.visible)
    for preset in PRESETS:
        for dtype, tolerance in ((torch.float64, VALUES_64), (torch.float32, VALUES)):
            found = []
            for device in ("cpu", sizes.device):
                of_patches = "patch_scores" in METRICS.get(name).needs
                model: Any = tiny_model("vit" if of_patches else "test_resnet")
                with torch.no_grad():
                    model.get_classifier().weight.mul_(20)  # so that scores differ
                    score = probabilities(model.to(device, dtype))
                    images = given.images.to(device, dtype)
                    judge = METRICS.get(name)(preset=preset, max_steps=8).to(device)
                    there = maps.to(device), given.label.to(device)
                    case = Case(images, *there, score, None, truth, right, brightness, logits(model))
                    if of_patches:
                        case = replace(case, patch_scores=PatchScores(model, images))
                    judge.update(case)
                    found.append(judge.per_image())
                    assert all(value.is_floating_point() for value in judge.compute().values())
            for key, expected in found[0].items():
                what = f"{key}, {preset}, {str(dtype).removeprefix('torch.')}"
                yield Check(what, furthest(found[1][key], expected), tolerance)


def prototypes(name: str, subject: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of a prototype metric's values of every prototype."""
    found = []
    for device in ("cpu", sizes.device):
        model = placed(subject, device)
        given = Found(*(x.to(device) for x in birds(24, 64, sizes.seed) if x is not None))
        judge = PROTOTYPE_METRICS.get(name)(model, PartBirds.part_names).to(device)
        with torch.no_grad(), full_float32():
            judge.update(model, given._replace(maps=model(given.images).maps))
            found.append(judge.of_all_ranks())
    for key, expected in found[0].items():
        yield Check(f"{key} of {subject}", furthest(found[1][key], expected), 1e-3)


def training(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Iterable[Row | Check]]]]:
    """Items: one training of each model."""
    for name in sizes.trainings:
        yield f"training of {name}", partial(trained, name, sizes)


def evaluation(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Iterable[Row | Check]]]]:
    """One item: the evaluation of a run."""
    yield f"evaluation of {sizes.judged}", partial(evaluated, sizes.judged, sizes)


def recipe(name: str) -> dict[str, Any]:
    """Model and phases of a training of a few steps; the last phase is trained after resuming."""
    if name in RECIPES:
        config = copy.deepcopy(RECIPES[name])
        for phase in config["phases"]:
            phase["epochs"] = 1
        if name == "protopnet":
            config["model"] |= {"last_layer_steps": 100, "prune_least": 0}
            config["phases"][1]["on_end"].append("prune")
        else:
            config["phases"].append({**config["phases"][1], "name": "more", "on_end": ["project"]})
        return config
    model = MODELS.build(name, tiny_options(name), num_classes=CLASSES)
    # B-CNN diverges at 1e-2, because its square roots are steep at 0: float32 and float64 differ by 4 % on one CPU.
    lrs = dict.fromkeys(model.parameter_groups(), 1e-4 if name in ("bcnn", "wsdan", "cal") else 1e-2)
    options = {"dpnet": {"complementary": 1.0, "covering": 0.1}}
    phases = [{"name": "train", "epochs": 1, "lrs": lrs}, {"name": "more", "epochs": 1, "lrs": lrs}]
    return {"model": {"name": name, **tiny_options(name), **options.get(name, {})}, "phases": phases}


def fit(folder: str, name: str, trainer: Mapping[str, Any], phases: Any, resume: Path | None = None) -> Path:
    """Train one of our models for these phases, into a folder; returns the run."""
    from interp_models.runs import train
    from interp_models.runs.building import resolve

    shared = copy.deepcopy(SHARED) | {"optimizer": {"name": "sgd"}, "attention": {"every_n_epochs": 1, "n_images": 2}}
    own = {"out": folder, "phases": phases, "trainer": shared["trainer"] | {"enable_model_summary": False, **trainer}}
    return train.train(resolve(check(TrainConfig, shared | recipe(name) | own)), resume)


def trained(name: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of a training on the device, resumed for its last phase, and of one in bfloat16, beside the CPU's."""
    there = {"accelerator": accelerator(sizes.device)}
    phases = recipe(name)["phases"]
    with TemporaryDirectory() as folder:
        with full_float32():
            expected = losses(fit(f"{folder}/cpu", name, {}, phases))
            run = fit(f"{folder}/device", name, there, phases[:-1])
            found = losses(fit(f"{folder}/device", name, there, phases, run))
        for epoch, (loss, other) in enumerate(zip(expected, found, strict=True)):
            away = abs(other - loss) / abs(loss)
            yield Check(f"training of {name}, loss of epoch {epoch}", away, LAST if epoch else FIRST)
        low = losses(fit(f"{folder}/bfloat16", name, {**there, "precision": "bf16-mixed"}, phases))
    yield Check(f"training of {name}, bfloat16, first loss", abs(low[0] - expected[0]) / abs(expected[0]), BFLOAT16)
    finite = all(abs(loss) < float("inf") for loss in low)
    yield Check(f"training of {name}, bfloat16, not finite", float(not finite), 0)


def accelerator(device: str) -> str:
    """Lightning's name of a device's accelerator."""
    return "gpu" if torch.device(device).type == "cuda" else "cpu"


def losses(run: Path) -> list[float]:
    """The training losses of a run by epoch."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def evaluated(name: str, sizes: Sizes) -> Iterator[Check]:
    """Checks of `evaluate.py`: a run with all explainers and all metrics, on the CPU and on the device."""
    with TemporaryDirectory() as folder:
        run = fit(f"{folder}/run", name, {}, recipe(name)["phases"])
        expected, there = (_means(run, where, sizes) for where in ("cpu", accelerator(sizes.device)))
    yield Check("evaluation, rows that only one has", float(len(expected.keys() ^ there.keys())), 0)
    for explainer in dict.fromkeys(explainer for explainer, _ in expected):
        both = [(there.get(key), mean) for key, mean in expected.items() if key[0] == explainer]
        a, b = (torch.tensor([float("nan") if x is None else x for x in some]) for some in zip(*both, strict=True))
        tolerance = 0.2 if explainer in AMPLIFIES else 2e-2
        yield Check(f"evaluation, means of {explainer}", furthest(a, b), tolerance)


def _means(run: Path, where: str, sizes: Sizes) -> dict[tuple[str, str], float | None]:
    """The means of an evaluation by explainer and metric, and 0 for each explainer that it left out."""
    from interp_models.runs import evaluate

    with TemporaryDirectory() as out:
        explainers = [{"name": name, **EXPLAINERS.get(name).small} for name in sizes.explainers if name != "scorecam"]
        own = {
            "explainers": explainers, "prototype_metrics": PROTOTYPE_METRICS.names(), "n_images": 6, "max_steps": 8,
            "report_images": 2, "batch_size": 4, "out": out, "logger": {"wandb": "disabled"},
            "trainer": {"accelerator": where, "enable_progress_bar": False},
        }  # fmt: skip
        evaluate.evaluate([run], check(EvaluateConfig, own))
        results = json.loads(Path(out, "results.json").read_text())
        of_prototypes = json.loads(Path(out, "prototypes.json").read_text())["rows"]
    means = {(row["explainer"], row["metric"]): row["mean"] for row in results["rows"]}
    means |= {("prototypes", row["metric"]): row["mean"] for row in of_prototypes}
    return means | {("left out", label): 0.0 for label in results["left_out"]}
