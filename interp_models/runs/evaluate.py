"""Run an evaluation: load runs, build other networks, and judge them on the same images."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn

from interp_models.core.errors import InputError, first_line
from interp_models.core.files import short
from interp_models.core.scoring import probabilities
from interp_models.core.written import text_of
from interp_models.data.module import DataModule
from interp_models.data.subsets import subsample
from interp_models.evaluation.comparison import Compared
from interp_models.evaluation.config import EvaluateConfig
from interp_models.evaluation.evaluate import Judging, check_evaluation, evaluate_models
from interp_models.evaluation.plan import explainer_specs
from interp_models.evaluation.tables import own_folder
from interp_models.prototypes.sources import Prototypical
from interp_models.runs.building import build_data
from interp_models.runs.config import EnsembleConfig
from interp_models.runs.folders import run_name
from interp_models.runs.loading import checkpoint_path, load, run_config, selection
from interp_models.runs.networks import Network, build_network, network_config
from interp_models.runs.resume import check_same_task
from interp_models.training.module import InterpModule
from interp_models.training.trainer import quiet
from interp_models.userstudy.making import (
    STUDIES,
    check_fits,
    check_labels_known,
    check_study,
    study_folder,
    write_study,
)
from interp_models.userstudy.pool import Pool
from interp_models.userstudy.reading import read_study


def evaluate(folders: Sequence[Path], config: EvaluateConfig, networks: Sequence[Any] = ()) -> Path:
    """Evaluate runs and other networks on the same images.

    Results, maps and report of each run are written to RUN/evaluation, those of each other network to
    runs/networks/<name>. A single model writes to `config.out` if that is given. Several models also get a joint
    report. The folders are locked against other evaluations.

    Args:
        folders: run folders.
        config: images, explainers, metrics and output folder.
        networks: further networks beside those of the config, as `network_config` takes them.

    Returns:
        The path of the report.

    Raises:
        InputError: if a model cannot be built, options do not fit, or the models have different test images.
    """
    quiet()
    options = check_evaluation(config)
    if config.answers is not None:
        raise InputError("answers: are read by userstudy=read")
    consent = None if config.userstudy is None else check_study(config.userstudy, config.study)
    others = [build_network(network_config(item)) for item in (*config.networks, *networks)]
    judged = _judged(folders, others, config)
    if config.userstudy is None:
        return evaluate_models(judged, config, options)
    labels = [label for label, _, _ in explainer_specs(config.explainers)]
    check_fits(config.userstudy, len(judged), config.target, labels)
    known = [one for one in judged if one.knows_labels and one.data.has_labels and not one.data.multilabel]
    check_labels_known(config.userstudy, [one.name for one in judged if one not in known])
    return evaluate_models(judged, config, options, partial(_write_study, config, consent))


def _write_study(
    config: EvaluateConfig, consent: str | None, judged: Sequence[Judging], compared: Sequence[Compared], folder: Path
) -> None:
    """Write the study of judged models beside their report."""
    models, data = [one.model for one in judged], [one.data for one in judged]
    known = [one.knows_labels for one in judged]
    pool = Pool(compared, models, data, explainer_specs(config.explainers), known)
    task = str(config.userstudy)
    on_gpu = torch.cuda.is_available() and config.trainer.get("accelerator") != "cpu"
    for model in models:  # Lightning leaves them on the CPU
        model.to("cuda" if on_gpu else "cpu")
    page = write_study(task, pool, study_folder(folder, task), config.study, config.seed, consent)
    print(f"study: {page}")


def read_answers(folders: Sequence[Path], config: EvaluateConfig) -> Path:
    """Read the answers of a study with people; returns the path of what they say.

    Args:
        folders: run folders, or folders of evaluations, that hold the study.
        config: names the folder of the answers.

    Raises:
        InputError: if the answers, or the study that they belong to, cannot be found or read.
    """
    if config.answers is None:
        raise InputError("userstudy=read reads answers=FOLDER, the folder of the files that participants saved")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name the folder of the report that the study was made with")
    homes = [home for folder in folders for home in (folder / "evaluation", folder)]
    if config.out is not None:
        homes.append(Path(config.out))
    studies = [one for home in homes for one in sorted(home.glob(f"{STUDIES}/*"))]
    return read_study(Path(config.answers), [*studies, *folders])


def _changes(config: EvaluateConfig | EnsembleConfig) -> dict[str, Any]:
    """Options of the data module that the config changes."""
    return {"dataset": config.dataset, **({} if config.batch_size is None else {"batch_size": config.batch_size})}


def _judged(folders: Sequence[Path], networks: Sequence[Network], config: EvaluateConfig) -> list[Judging]:
    """Load the models and their images; all must be judged on the same images."""
    if not folders and not networks:
        raise InputError("no model is given: name run folders, or networks=[...]")
    names = [*(run_name(folder) for folder in folders), *(network.name for network in networks)]
    if len(set(names)) < len(names):
        raise InputError(f"two models have the same name, but results are listed by name: {', '.join(names)}")
    for first, second in itertools.combinations(networks, 2):
        if results_of(first) == results_of(second):
            both = f"{first.name!r} and {second.name!r}"
            raise InputError(f"networks {both} would both write to {results_of(first)}; give one another name")
    single = len(names) == 1 and config.out is not None
    judged = [judging_of(folder, config) for folder in folders]
    dataset = judged[0].config["data"]["dataset"] if judged else {}
    judged += [_of_network(network, dataset, config) for network in networks]
    if single:
        judged = [dataclasses.replace(judged[0], results=own_folder(Path(str(config.out)), "out"))]
    for one in judged:
        one.data.memory = one.results
        one.data.test_indices = subsample(one.data.test_indices, config.n_images, config.seed)
        one.data.check_files("test", *(("train", "whole_test") if isinstance(one.model, Prototypical) else ()))
    check_same_images({one.name if one.folder is None else str(one.folder): one.data for one in judged})
    return judged


def judging_of(folder: Path, config: EvaluateConfig | EnsembleConfig) -> Judging:
    """Load the model of a run and the test images to judge it on.

    Raises:
        InputError: if the folder is not a run, its images do not fit the model, or it was trained on some of them.
    """
    node = run_config(folder)
    model, data = load(folder, config.ckpt)[0], build_data(node, **_changes(config))
    has_classes = bool(data.classes)  # image files have none, and labels -1
    if model.classes:
        data.as_classes(model.classes, str(folder))
    elif len(data.classes) != model.num_classes:  # an older checkpoint, which holds no names
        raise InputError(f"{folder}: the model has {model.num_classes} classes, the data set {len(data.classes)}")
    if has_classes:
        check_same_task(model.task, data, str(folder))
    check_drawn(folder, model, data, moved=bool(config.dataset))
    return Judging(
        name=run_name(folder),
        model=model,
        num_classes=model.num_classes,
        data=data,
        results=folder / "evaluation",
        selection=selection(node, config.ckpt),
        seed=int(node["seed"]),
        described=node["model"]["name"],
        transform={key: node["data"][key] for key in ("image_size", "crop_to_box", "transforms")},
        folder=folder,
        config=node,
        checkpoint=checkpoint_path(folder, config.ckpt),
    )


def _of_network(network: Network, dataset: Mapping[str, Any], config: EvaluateConfig) -> Judging:
    """A network that was not trained here, with the images of `dataset=` or, by default, of the runs beside it."""
    name = config.dataset.get("name", dataset.get("name"))
    if name is None:
        raise InputError(
            f"{network.name}: dataset.name must be given, as there is no run beside it; dataset.name=image_files "
            "dataset.root=FOLDER takes any images"
        )
    same = text_of(name) == dataset.get("name")
    node = {
        "dataset": dataset if same else {},
        "image_size": network.image_size,
        "transforms": network.transform,
        "val_fraction": 0.0,
    }
    try:  # before any model is judged; the scores refuse outputs that are not logits of at least two classes
        scores = probabilities(network.model)(torch.zeros(1, 3, network.image_size, network.image_size))
    except InputError as error:
        raise InputError(f"networks: {network.name}: {error}") from None
    except Exception as error:  # networks raise errors of many types
        size = network.image_size
        raise InputError(
            f"networks: {network.name} cannot take RGB images of {size} × {size} pixels ({first_line(error)})"
        ) from error
    return Judging(
        name=network.name,
        model=network.model,
        num_classes=scores.shape[1],
        data=build_data({"data": node}, **_changes(config)),
        results=results_of(network),
        selection="as given",
        seed=None,
        described=network.described,
        transform={key: node[key] for key in ("image_size", "transforms")},
    )


def results_of(network: Network) -> Path:
    """Folder of the results of a network that was not trained here."""
    return Path("runs") / "networks" / short(re.sub(r"[^\w.-]+", "_", network.name))


def check_same_images(modules: Mapping[str, DataModule]) -> None:
    """Raise `InputError` unless all models have the same test images and the same classes.

    Args:
        modules: data module of each model; the keys name the models in messages.
    """
    (name, first), *others = modules.items()
    for other_name, other in others:
        same = other.classes == first.classes and _ids(other) == _ids(first)
        if not same or other.contents("test") != first.contents("test"):
            raise InputError(f"runs {name} and {other_name} have different test images and cannot be compared")


def _ids(data: DataModule) -> list[str]:
    return [data.test_images.image_id(int(index)) for index in data.test_indices]


def check_drawn(folder: Path, model: InterpModule, data: DataModule, *, moved: bool) -> None:
    """Refuse test images that may have been trained on.

    A data set without a split of its own draws its test images from one folder. If the training images of that folder
    have changed since the training, other images are drawn, and the model may have seen them.

    Args:
        folder: the run folder, for messages.
        model: the model, which records its training images.
        data: the images to judge.
        moved: whether the config names another data set than the run. Then this is only a warning.
    """
    before = model.images.get("train")
    if not data.train_images.note or before is None or before[1] == data.fingerprint("train"):
        return
    why = f"{folder}: {data.train_images.note}, but the training images are others than the run's"
    if not moved:
        raise InputError(f"{why}, so that some were trained on; give folders train/ and test/, or a list with a split")
    rank_zero_warn(f"{why}; if both folders have images in common, some may have been trained on")
