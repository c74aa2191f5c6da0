"""`judge`: evaluate explanations of any classifier in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_models.core.classifier import Output
from interp_models.core.digests import network_digest
from interp_models.core.distributed import gathered_objects, is_first, rank_and_ranks, wait_for_all
from interp_models.core.errors import InputError, first_line
from interp_models.core.files import locked
from interp_models.core.modes import evaluating
from interp_models.core.plugins import import_plugins
from interp_models.core.prepared import class_name, release, unwrapped
from interp_models.core.schema import parse
from interp_models.core.scoring import logits_of
from interp_models.data.base import Sample, of_each
from interp_models.evaluation.cache import FolderCache, MemoryCache
from interp_models.evaluation.config import ExplanationConfig
from interp_models.evaluation.engine import Engine
from interp_models.evaluation.images import Images, images_of
from interp_models.evaluation.judgement import Judgement, summary_of, write_pictures
from interp_models.evaluation.normalisation import classifier_of, device_of
from interp_models.evaluation.plan import cache_keys, check_plan, check_written, has_row_per_label, metric_keys
from interp_models.evaluation.tables import Provenance, Tables, compare_again, finished, own_folder
from interp_models.explainers.base import Explainer

Picture = np.ndarray[Any, Any]
PICTURES = 60
"""At most so many images are kept as pictures for the page."""


def judge(
    model: nn.Module,
    images: Any,
    explainers: Sequence[str | Mapping[str, Any] | Explainer] = ("gradcam", "activation_map", "random"),
    metrics: Sequence[str] = ("ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic"),
    *,
    labels: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    classes: Sequence[str] = (),
    target: str | int = "prediction",
    normalize: Any = "auto",
    output: Output = None,
    image_size: int | None = None,
    n_images: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    preset: str = "gomez2023",
    grid: Sequence[int] | str | None = None,
    max_steps: int | None = None,
    control: str | None = None,
    reference: str | None = None,
    batch: int | None = None,
    preparation: str = "exact",
    folder: str | Path | None = None,
    name: str | None = None,
    plugins: Sequence[str] = (),
    progress: bool = True,
) -> Judgement:
    """Judge explanations of a classifier: compute every metric for the maps of every explainer, on the same images.

    If `torch.distributed` is initialised, ranks share the images, and every rank returns the result for all images.

    Args:
        model: any module that maps images (B, C, H, W) to logits (B, K), from this package, timm, torchvision or your
            own code. It is judged in eval mode on the device of its weights, and is not changed.
        images: a tensor (N, C, H, W), a DataLoader, a data set (one of this package, or any that returns images or
            pairs of image and label), or a folder of image files. Pixels of tensors are in [0, 1]; 0 is black. Image
            files are resized and cropped as the model's timm data config says (224 pixels by default).
        explainers: names, mappings with `name`, options and an optional `label`, or explainer objects of this model.
        metrics: keys of metrics.
        labels: the class of each image, if `images` is a tensor. Several labels per image are the list of the classes
            of each image, or a tensor bool (N, K) for the model's K classes, in which form loaders and data sets give
            them, too.
        classes: names of the classes.
        target: class to explain: `prediction`, `label`, or a class number. With `label`, each of several labels of an
            image has a map and values, and an image without a label has none.
        normalize: normalisation of images in [0, 1] before the model sees them: `imagenet`, a pair (mean, std), None
            for no normalisation, or `auto`. With `auto`, a timm model gets its own statistics. A model of this package
            and one that begins with a module `Normalize` get none, because they normalise inside. Any other model gets
            ImageNet's if images come from files, with a warning unless it is torchvision's, and none if they are
            tensors; a torchvision model with tensors is refused, because torchvision does not say which it needs.
        output: how to read logits from the model's output, see `interp_models.Classifier`.
        image_size: side in pixels to which image files are brought.
        n_images: number of images to judge, drawn by `seed`; None judges all.
        seed: seed of this draw; random explainers have a `seed` of their own.
        batch_size: images per batch.
        preset: protocol of the metrics: `gomez2023`, `saliency-maps-metrics`, `rise`, `opticam`, `guidance` or `idsds`.
        grid: grid (rows, columns) to which every map is brought, `native` for each map's own grid, or None for the
            grid of the model's last feature map (7 × 7 if no layer gives one).
        max_steps: maximum number of steps of a deletion or insertion curve; None takes the preset's.
        control: label of the explainer that the others are tested against; None takes `random`, if it is there.
        reference: label of the explainer that the page compares the others with; None takes `intrinsic`, else
            `gradcam`.
        batch: images per forward pass of the metrics; None chooses a size for the device.
        preparation: how the model is prepared for many passes: `exact`, `compiled`, `bfloat16` or `none`.
        folder: folder of the results. An interrupted call with the same folder continues where it stopped. None keeps
            all in memory; a map as fine as the image (`random`, gradients) takes 200 kB at 224 pixels.
        name: name of the model in tables; None takes its class name.
        plugins: files and packages to import first; they register explainers or metrics.
        progress: whether to show a progress bar.

    Returns:
        Values per image, their means, the maps, and methods for tables and the report.

    Raises:
        InputError: for an unknown explainer, metric or option, for images that do not fit the model, for outputs that
            are not logits, and if no explainer applies to the model.
    """
    for key, value in (("explainers", explainers), ("metrics", metrics), ("plugins", plugins)):
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InputError(f"{key} must be a list; got {value!r}")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    import_plugins(plugins)
    explainers = [dict(item) if isinstance(item, Mapping) else item for item in explainers]
    given = [item for item in explainers if isinstance(item, Explainer)]
    options = {
        "explainers": [item for item in explainers if not isinstance(item, Explainer)],
        "metrics": list(metrics),
        "preset": preset,
        "grid": list(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else grid,
        "max_steps": max_steps,
        "target": target,
        "control": control,
        "reference": reference,
        "batch": batch,
        "preparation": preparation,
        "n_images": n_images,
    }
    plan = ExplanationConfig(**parse(ExplanationConfig, options, "judge"))
    specs, _ = check_plan(plan, [label for label, _ in _labelled(given)])
    if folder is not None:
        check_written(specs)
    if folder is not None and given:
        raise InputError("explainers: with folder=, give names or mappings with options, not explainer objects")
    with _together():
        source = images_of(images, model, labels=labels, image_size=image_size, batch_size=batch_size)
        judged = classifier_of(model, normalize, output, from_files=source.from_files)
        source = source.drawn(n_images, seed)
    about = {"name": name or class_name(judged), "classes": list(classes)}
    with ExitStack() as stack:
        stack.callback(release, judged)
        stack.callback(release, unwrapped(judged))
        if folder is None:
            return _judged(judged, source, plan, _labelled(given), about, None, progress)
        where = Path(folder).expanduser()
        with _together():
            if is_first():
                stack.enter_context(_own(where))
        return _judged(judged, source, plan, [], about, where, progress)


@contextmanager
def _together() -> Iterator[None]:
    """Stop all ranks if one of them stops inside, where none may wait for another one."""
    stopped: Exception | None = None
    try:
        yield
    except Exception as error:
        if rank_and_ranks()[1] == 1:
            raise
        stopped = error
    messages = gathered_objects(None if stopped is None else str(stopped) or type(stopped).__name__)
    if stopped is not None and not isinstance(stopped, InputError):
        raise stopped
    for message in filter(None, messages):
        raise InputError(message) from stopped


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Make the folder and lock it for other processes."""
    own_folder(folder, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder={folder} cannot be made: {error.strerror}") from None
    with locked(folder, "an evaluation", "wait for its end, or give another folder"):
        yield


def _labelled(explainers: Iterable[Explainer]) -> list[tuple[str, Explainer]]:
    """Label explainer objects by their class names; a name that occurs again gets a number."""
    found: list[tuple[str, Explainer]] = []
    for explainer in explainers:
        own = type(explainer).__name__
        count = sum(label.partition("-")[0] == own for label, _ in found)
        found.append((f"{own}-{count + 1}" if count else own, explainer))
    return found


def _judged(
    model: nn.Module,
    source: Images,
    plan: ExplanationConfig,
    given: Sequence[tuple[str, Explainer]],
    about: Mapping[str, Any],
    folder: Path | None,
    progress: bool,
) -> Judgement:
    with _together():
        first, columns = _checked(model, source, plan, about["classes"])
    digest = "" if folder is None and rank_and_ranks()[1] == 1 else network_digest(model)  # reads all weights
    if len(set(gathered_objects(digest))) > 1:
        raise InputError("the processes have models with different weights; load the same weights in all of them")
    shapes = set(gathered_objects((tuple(first.image.shape[1:]), tuple(first.label.shape[1:]))))
    if len(shapes) > 1:
        found = " and ".join(f"images {image} with labels {label}" for image, label in sorted(shapes))
        raise InputError(f"the processes have images or labels of different shapes: {found}")
    same_classes = len(source.classes) in (0, columns)
    cache: FolderCache | MemoryCache = MemoryCache()
    with _together():
        example = first.image[:1].to(device_of(model))
        engine = Engine(model, plan, example, cache, explainers=given, same_classes=same_classes)
    if folder is not None:
        engine.cache = cache = _folder_cache(folder, engine, source, [digest, about])
        if gathered_objects(_is_finished(folder, cache))[0]:
            with _together():
                if is_first():
                    compare_again(folder, plan.control, plan.reference)
            return Judgement.load(folder)
    indices, without_label, pictures = _judge_all(engine, source, progress)
    if not indices:
        raise InputError("target 'label': no image has a label; target='prediction' works")
    if isinstance(cache, MemoryCache):
        cache.gather()
    described = {
        "name": about["name"], "model": class_name(model), "dataset": source.name, "same_classes": same_classes,
    }  # fmt: skip
    classes = tuple(about["classes"]) or (tuple(source.classes) if same_classes else ())
    wait_for_all()
    tables: Tables | None = None
    with _together():
        if folder is None or is_first():
            provenance = Provenance(about["name"], "as given", None)
            if folder is not None:
                (folder / "results.json").unlink(missing_ok=True)  # it says that all is there, so it comes last
                write_pictures(folder, pictures, classes, described)
            tables = engine.tables(indices, provenance, source.image_id, folder, without_label)
    if tables is None:
        assert folder is not None
        return Judgement.load(folder)
    return Judgement(tables, summary_of(tables, **described), classes, pictures)


def _checked(model: nn.Module, source: Images, plan: ExplanationConfig, names: Sequence[str]) -> tuple[Sample, int]:
    """The first batch and the number of the model's classes; `InputError` if labels or names do not fit them."""
    first = source.first()
    if first is None:
        raise InputError("there are no images")
    columns = _columns(model, first.image[:1].to(device_of(model)), source.from_files)
    if names and len(names) != columns:
        raise InputError(f"classes: {len(names)} names are given, and the model has {columns} classes")
    same_classes = len(source.classes) in (0, columns)
    several = first.label.dim() == 2
    if plan.target == "label" and not several and int(first.label.min()) < 0:
        without = "the images have" if bool((first.label < 0).all()) else "some images have"
        raise InputError(f"target 'label' needs labels, and {without} none; target='prediction' works")
    if plan.target == "label" and not same_classes:
        raise InputError(
            f"target 'label': the images have {len(source.classes)} classes, and the model has {columns}; "
            "target='prediction' works"
        )
    known = first.label if source.labels is None else source.labels
    present = known.any(dim=0).nonzero()[:, 0] if several else known.flatten()
    if several and same_classes and not source.listed and first.label.shape[1] != columns:
        shape = f"bool (N, {columns}), as the model has {columns} classes"
        raise InputError(f"labels: several labels of each image must be {shape}; got {first.label.shape[1]} columns")
    bad = next((int(label) for label in present if not 0 <= label < columns), None)
    if bad is not None and (plan.target == "label" or (several and same_classes)):
        where = "target 'label'" if plan.target == "label" else "labels"
        raise InputError(f"{where}: label {bad} is out of range; the model has classes 0 to {columns - 1}")
    return first, columns


def _columns(model: nn.Module, example: Tensor, from_files: bool) -> int:
    """The number of the model's classes."""
    try:
        with torch.no_grad(), evaluating(model):
            return logits_of(model(example)).shape[1]
    except InputError:
        raise
    except Exception as error:  # networks raise errors of many types
        shape = f"{tuple(example.shape)} of {str(example.dtype).removeprefix('torch.')}"
        hint = "; image_size= sets the side of image files" if from_files else ""
        raise InputError(f"{class_name(model)} cannot take images {shape} ({first_line(error)}){hint}") from error


def _folder_cache(folder: Path, engine: Engine, source: Images, model: Any) -> FolderCache:
    """The cache in a folder; it finds results of the same model (its digest and names), protocol and images again."""
    plan = engine.plan
    protocol = [plan.preset, engine.grid, plan.max_steps, plan.target, plan.preparation, metric_keys(engine.keys)]
    with _together():
        content = source.digest()
    contents = gathered_objects(content)  # a loader may give each rank its own images
    return FolderCache(folder, [model, protocol, contents], cache_keys(engine.specs))


def _is_finished(folder: Path, cache: FolderCache) -> bool:
    """Whether the folder has the complete results of this work, with the pictures for the page."""
    try:
        return finished(folder, cache) and bool(Judgement.load(folder))
    except InputError:
        return False


def _judge_all(engine: Engine, source: Images, progress: bool) -> tuple[list[int], int, dict[int, Picture]]:
    """Judge this rank's images.

    Returns:
        The indices of all ranks' images that have a row, the number of those without a label to explain, and pictures
        of some images for the page.
    """
    rank, ranks = rank_and_ranks()
    if progress and rank == 0:
        engine.show_progress(None if source.count is None else -(-source.count // source.batch_size // ranks))
    device = device_of(engine.model)
    indices: list[int] = []
    without: list[int] = []
    pictures: dict[int, Picture] = {}
    shown = source.shown(PICTURES)
    with _together():
        try:
            for sample in source.batches(rank, ranks):
                numbers = sample.index.tolist()
                has_row = torch.ones(len(numbers), dtype=torch.bool)
                if has_row_per_label(engine.plan, sample.label):
                    has_row = sample.label.any(dim=1)
                for number, one in zip(numbers, has_row.tolist(), strict=True):
                    (indices if one else without).append(number)
                for place, number in enumerate(numbers):
                    if len(pictures) < PICTURES if shown is None else number in shown:
                        pictures[number] = _picture(sample.image[place])
                engine.judge(of_each(sample, lambda value: value.to(device)), pictures)
        finally:
            engine.bar.close()
    engine.agree()
    pictures = {index: picture for part in gathered_objects(pictures) for index, picture in part.items()}
    known, unlabelled = ({i for part in gathered_objects(own) for i in part} for own in (indices, without))
    return sorted(known), len(unlabelled), dict(sorted(pictures.items()))


def _picture(image: Tensor) -> Picture:
    from interp_models.report.visual import to_uint8

    return to_uint8(image if image.shape[0] == 3 else image[:1].expand(3, -1, -1))
