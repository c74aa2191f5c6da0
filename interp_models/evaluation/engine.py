"""`Engine` computes the maps of every explainer and the values of every metric, batch by batch."""

import inspect
import json
import sys
from collections import ChainMap
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from interp_models.core.batches import all_scores, predicted
from interp_models.core.choices import Preparation
from interp_models.core.digests import code_digest
from interp_models.core.distances import Watcher
from interp_models.core.distributed import gathered_objects, is_first
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.known import unchanging
from interp_models.core.modes import evaluating, full_float32
from interp_models.core.passes import counted_passes, seconds_now
from interp_models.core.plugins import line_of
from interp_models.core.prepared import prepare, unwrapped
from interp_models.core.scoring import logits, probabilities, resolve_target
from interp_models.core.truth import Truth
from interp_models.data.base import Sample, of_each, rows_of, truth_of
from interp_models.evaluation.cache import Cache, Part
from interp_models.evaluation.config import ExplanationConfig
from interp_models.evaluation.plan import check_plan, described, has_row_per_label, make_metrics, resolve_grid
from interp_models.evaluation.table_making import make_tables, values_of
from interp_models.evaluation.tables import Protocol, Provenance, Tables, image_means
from interp_models.evaluation.wrong import Wrong, maps_of_label, wrong_predictions
from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.explainers.features import shared_passes
from interp_models.metrics.base import METRICS, Grid, MapMetric
from interp_models.metrics.case import Case
from interp_models.nn.dropping import PatchScores


class Engine:
    """Judges explainers of one model by metrics, image by image. Results go to a cache.

    It does not use a trainer: each rank passes its own batches to `judge`, and calls `agree` after the last one.

    Args:
        model: any module that returns logits.
        plan: explainers, metrics and protocol.
        example: an image (1, 3, H, W) on the model's device, of the same size as all images.
        cache: receives values and maps, and returns those of an interrupted evaluation.
        explainers: pairs of label and explainer, beside those of the plan.
        same_classes: whether the labels of the images are classes of the model. If not, they are not compared with
            predictions, and ground truth of single classes is unknown.
        warned: labels of explainers that were already reported as left out; new ones are added.

    Raises:
        InputError: for an unknown explainer, metric or target, or if there is no explainer or no metric.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ExplanationConfig,
        example: Tensor,
        cache: Cache,
        *,
        explainers: Iterable[tuple[str, Explainer]] = (),
        same_classes: bool = True,
        warned: set[str] | None = None,
    ) -> None:
        self.model, self.plan, self.cache, self.same_classes = model, plan, cache, same_classes
        self.specs, self.keys = check_plan(plan, given := dict(explainers))
        self.labels = [*(label for label, _, _ in self.specs), *given]
        self.left_out: dict[str, str] = {}
        """Why explainers do not apply, by label."""
        self.unmeasured: dict[str, str] = {}
        """Why metrics have no values, by key: the ground truth that they need is unknown."""
        self._lacks: dict[str, str] = {}
        """Why the model cannot give what a metric needs, by its name in `Case`."""
        self._failed: dict[str, str] = {}
        """Why a metric has no value of an explainer for some images, by the names of both."""
        self._measured: set[str] = set()
        """Names of metrics with values for at least one batch."""
        self.bar = tqdm(disable=True)
        self._warned = set() if warned is None else warned
        self._explainers: dict[str, Explainer] = {}
        self._options = {
            label: json.dumps({"name": name, **options}, default=described) for label, name, options in self.specs
        }
        self._options |= {label: json.dumps({"name": _name_of(explainer)}) for label, explainer in given.items()}
        with torch.inference_mode(False):
            for label, name, options in self.specs:
                try:
                    self._explainers[label] = EXPLAINERS.build(name, options, model=model)
                except NotApplicable as error:
                    self._leave_out(label, str(error))
            for explainer in self._explainers.values():
                explainer.preparation = plan.preparation
            for label, explainer in given.items():
                if explainer.model is not unwrapped(model):
                    raise InputError(
                        f"{label} was built for another model than the one that is judged, which may be wrapped to "
                        "normalise images; give its name and options, or build it for an interp_models.Classifier"
                    )
            self._explainers |= given
            self.grid = resolve_grid(plan.grid, model, example)
            self._metrics = {label: self._make_metrics(example) for label in self.labels}
            """Metrics by label of the explainer: each explainer has its own, as a metric warns if the grid of its maps
            changes."""

    def _make_metrics(self, example: Tensor) -> dict[str, MapMetric]:
        made = make_metrics(self.plan, self.keys, self.grid)
        for metric in made.values():
            metric.to(example.device).size = (example.shape[-2], example.shape[-1])
        return made

    def show_progress(self, batches: int | None) -> None:
        """Show a progress bar.

        Args:
            batches: number of batches of this rank; None if it is unknown.
        """
        total = None if batches is None else batches * len(self.labels)
        self.bar = tqdm(total=total, desc="explanations", unit="batch", leave=False)

    def judge(self, batch: Sample, shown: Container[int] = ()) -> None:
        """Apply all explainers and metrics to one batch; the results of each explainer go to the cache at once.

        If images have several labels and the plan's target is `label`, every label is explained: there is a row for
        each image and label, and none for an image without a label.

        Args:
            batch: images and labels; the label -1 means unknown. Several labels are bool (B, K).
            shown: indices of the images that the page shows, with maps of the true class if the prediction is wrong.
        """
        # Lightning evaluates in inference mode; its tensors must not end up in states or graphs. Its mixed precision
        # ends before callbacks run. So clean scores are computed here, in float32 like the masked ones.
        with (
            torch.inference_mode(False), torch.no_grad(), evaluating(self.model), full_float32(), shared_passes(),
            unchanging(),
        ):  # fmt: skip
            self.bar.update(len(self.labels) - len(self._explainers))
            if not self._explainers:
                return
            given, of_row = of_each(batch, torch.clone), None
            if has_row_per_label(self.plan, given.label):
                rows, of_row = given.label.nonzero(as_tuple=True)
                if not len(rows):
                    self.bar.update(len(self._explainers))
                    return
                given = rows_of(given, rows.tolist())
            case, common, classes = self._case(given, of_row)
            wrong = None
            if self.plan.target == "prediction" and self.same_classes:
                wrong = wrong_predictions(given, common["prediction"], classes, shown)
            lacking = self._check_metrics(case)
            for name, explainer in list(self._explainers.items()):
                self.bar.set_postfix_str(name)
                if self.cache.find(name, given.index) is None:
                    try:
                        self._judge(name, explainer, case, common, lacking, wrong)
                    except NotApplicable as error:
                        self._leave_out(name, str(error))
                self.bar.update()

    def _case(self, given: Sample, of_row: Tensor | None) -> tuple[Case, dict[str, Tensor], int]:
        """What metrics see of a batch, but for the maps; what all explainers' results have in common; and the number of
        the model's classes.

        Args:
            given: images and labels.
            of_row: class of each image to explain; None takes the plan's target.
        """
        images, label, index = given.image, given.label, given.index
        prepared = prepare(self.model, images, self.plan.preparation)
        score_fn, watcher = probabilities(prepared), self._watcher(prepared, images)
        with nullcontext() if watcher is None else watcher.into(["clean"]):
            scores = all_scores(score_fn, images, self.plan.batch)
        if not bool(scores.isfinite().all()):
            bad = index[~scores.isfinite().all(dim=1)].tolist()
            raise InputError(f"the model returns NaN or infinite values for image {bad[0]}")
        prediction = predicted(self.model, images, scores, self.plan.batch)
        target = resolve_target(self._target(prediction, label) if of_row is None else of_row, scores)
        clean, confidence = (scores.gather(1, classes[:, None])[:, 0] for classes in (target, prediction))
        common = {"index": index, "label" if label.dim() == 1 else "labels": label}
        common |= {"prediction": prediction, "confidence": confidence}
        common |= {"target_class": target, "probability": clean}
        case = Case(
            images, images[:, 0], target, score_fn, clean,
            truth_of(given if self.same_classes else _without_classes(given), target),
            _correct(prediction, label) if self.same_classes else None,
            logit_fn=logits(prepared), patch_scores=self._patch_scores(images), watcher=watcher,
        )  # fmt: skip
        return case, common, scores.shape[1]

    def _watcher(self, prepared: nn.Module, images: Tensor) -> Watcher | None:
        """What sees the features of perturbed images; None if no metric perturbs any, or if they cannot be seen."""
        perturbs = any(METRICS.get(name).perturbs() for name in self.keys.values())
        if not perturbs or self.plan.preparation == "compiled":  # hooks do not see into a compiled copy
            return None
        with suppress(NotApplicable):
            return Watcher(prepared, images)
        return None

    def _patch_scores(self, images: Tensor) -> PatchScores | None:
        """The scores of some patches, if a metric wants them and the model can give them."""
        if not any("patch_scores" in METRICS.get(name).needs for name in self.keys.values()):
            return None
        how: Preparation = "exact" if self.plan.preparation == "compiled" else self.plan.preparation
        try:
            return PatchScores(prepare(self.model, images, how), images)
        except NotApplicable as error:
            self._lacks["patch_scores"] = str(error)
            return None

    def _judge(
        self,
        name: str,
        explainer: Explainer,
        case: Case,
        common: dict[str, Tensor],
        lacking: set[str],
        wrong: Wrong | None,
    ) -> None:
        """Compute the maps of one explainer and the values of all metrics, and give them to the cache."""
        assert isinstance(case.target, Tensor)
        maps, costs = self._explained(explainer, case.images, case.target, case.truth)
        explain = partial(_explained_apart, explainer, case.target, case.truth)
        case = replace(case, maps=maps, explain=explain, curves={})
        values: dict[str, Tensor] = {}
        if case.watcher is not None:
            case.watcher.sums = {"clean": case.watcher.sums["clean"]}
        try:
            for metric_name, metric in self._metrics[name].items():
                values |= self._scored(metric, case, name, applies=metric_name not in lacking)
        except InputError as error:
            raise InputError(f"explainer {name}: {error}") from error
        part = {"common": common, "maps": maps, "values": values, "costs": costs, "curves": case.curves}
        if wrong is not None and explainer.uses_class:
            part["of_label"] = maps_of_label(explainer, wrong, maps)
        self.cache.keep(name, part | ({} if case.watcher is None else {"features": case.watcher.sums}))

    def _explained(
        self, explainer: Explainer, images: Tensor, target: Tensor, truth: Truth
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The maps and their costs per image: passes and seconds. A pass that is shared counts for each explainer."""
        model = unwrapped(self.model)
        copy = prepare(model, images, self.plan.preparation)  # not part of the measured time
        with counted_passes(model, copy) as passes:
            start = seconds_now(images)
            maps = explainer.attribute(images, target, truth)
            seconds = seconds_now(images) - start + passes.seconds
        each = {"passes": passes.images / len(images), "seconds": seconds / len(images)}
        return maps, {key: torch.full((len(images),), value, dtype=torch.float64) for key, value in each.items()}

    def _scored(self, metric: MapMetric, case: Case, name: str, *, applies: bool) -> dict[str, Tensor]:
        """The values of a metric; undefined if it does not apply, or if the explainer cannot explain what the metric
        makes of the images."""
        if applies:
            try:
                return metric.score(case)
            except NotApplicable as error:
                self._failed[f"{', '.join(metric.wanted)} of {name}"] = str(error)
            except InputError:
                raise
            except Exception as error:
                if code_digest(type(metric)):  # of a plugin: its author needs the line, and not our frames
                    own = inspect.getfile(type(metric))
                    raise InputError(f"metric {type(metric).__name__}: {line_of(error, own)}") from error
                raise
        return metric.undefined(case.images)

    def _check_metrics(self, case: Case) -> set[str]:
        """Names of the metrics that have no value for these images, as something is unknown.

        Raises:
            InputError: if no metric has had any value so far, and other images cannot change that.
        """
        lacking: dict[str, str] = {}
        for name in dict.fromkeys(self.keys.values()):
            needs = [need for need in METRICS.get(name).needs if need != "explain"]  # every explainer can
            if reason := case.lacks(needs):
                lacking[name] = next((self._lacks[need] for need in needs if need in self._lacks), reason)
            else:
                self._measured.add(name)
        self.unmeasured |= {key: lacking[name] for key, name in self.keys.items() if name in lacking}
        if not any("correct" in METRICS.get(name).needs for name in lacking):  # other images may have labels
            self._check_measured()
        return set(lacking)

    def _check_measured(self) -> None:
        """Raise `InputError` if batches were judged and no metric has a value."""
        if self.unmeasured and not self._measured:
            raise InputError(f"no metric applies: {'; '.join(f'{key} {why}' for key, why in self.unmeasured.items())}")

    def _target(self, prediction: Tensor, label: Tensor) -> Tensor | int:
        target = self.plan.target
        return label if target == "label" else prediction if target == "prediction" else int(target)

    def _tell(self, label: str, why: str, what: str = "left out") -> None:
        if label not in self._warned and is_first():
            tqdm.write(f"{what} {label}: {why}", file=sys.stderr)
        self._warned.add(label)

    def _leave_out(self, label: str, why: str) -> None:
        self._tell(label, why)
        self.left_out[label] = why
        self._explainers.pop(label, None)

    def agree(self) -> None:
        """Leave out, on all ranks, every explainer that does not apply on some rank, and every metric without a value
        on any rank. Call it after the last batch.

        Raises:
            InputError: if no explainer is left.
        """
        reasons = ChainMap(*gathered_objects(self.left_out))  # the first rank with a reason counts
        self.left_out = {label: reasons[label] for label in self.labels if label in reasons}
        for label, why in self.left_out.items():
            self._leave_out(label, why)
        self._measured = set().union(*gathered_objects(self._measured))
        unmeasured = ChainMap(*gathered_objects(self.unmeasured))
        self.unmeasured = {
            key: unmeasured[key] for key, name in self.keys.items() if key in unmeasured and name not in self._measured
        }
        for what, why in ChainMap(*gathered_objects(self._failed)).items():
            self._tell(what, why, "undefined for some images:")
        for why in dict.fromkeys(self.unmeasured.values()):  # one line for all metrics with the same need
            self._tell(", ".join(key for key, own in self.unmeasured.items() if own == why), why)
        self._check_measured()
        if not self._explainers:
            raise InputError(f"no explainer applies: {'; '.join(f'{label}: {why}' for label, why in reasons.items())}")

    @property
    def applying(self) -> dict[str, str]:
        """Explainers that apply: name and options as json, by label."""
        return {label: self._options[label] for label in self.labels if label in self._explainers}

    @property
    def measured(self) -> dict[str, str]:
        """Keys that have values: the registered name of the metric by key."""
        return {key: name for key, name in self.keys.items() if key not in self.unmeasured}

    def protocols(self, grid: Grid) -> dict[str, Protocol]:
        """The protocol of every metric key, for maps that the explainer computes on `grid`."""
        grid, plan = self.grid or grid, self.plan
        protocols = {}
        for key, name in self.measured.items():
            metric = next(iter(self._metrics.values()))[name]
            steps, fill = metric.protocol(key, grid)
            cells, better = f"{grid[0]}x{grid[1]}", metric.higher_is_better_by_key[key]
            protocols[key] = Protocol(plan.preset, cells, steps, fill, str(plan.target), plan.preparation, better)
        return protocols

    def tables(
        self,
        indices: Sequence[int],
        provenance: Provenance,
        image_id: Callable[[int], str],
        folder: Path | None = None,
        without_label: int = 0,
    ) -> Tables:
        """The tables of the results; see `make_tables`. Call it after `agree`, on one rank if there is a folder."""
        return make_tables(
            self.cache, indices, self.applying, self.left_out, self.protocols, provenance, image_id, folder=folder,
            without_label=without_label, unmeasured=self.unmeasured, control=self.plan.control,
            reference=self.plan.reference,
        )  # fmt: skip

    def means(self, indices: set[int]) -> dict[tuple[str, str], Tensor]:
        """The means over images by explainer and key; NaN if the metric is undefined for all images. The values of
        several labels of an image are averaged first."""
        found = {}
        for label in self.applying:
            parts: list[Part] = self.cache.of(label, indices)
            for key in self.measured:
                mean = torch.tensor(torch.nan)
                if parts:
                    values, index = values_of(parts, key), torch.cat([part["common"]["index"] for part in parts])
                    mean = image_means(index, values).nanmean()
                found[label, key] = mean
        return found


def _name_of(explainer: Explainer) -> str:
    """The registered name of an explainer's class, or else the name of the class."""
    own = type(explainer)
    return next((name for name in EXPLAINERS.names() if EXPLAINERS.get(name) is own), own.__name__)


def _explained_apart(explainer: Explainer, target: Tensor, truth: Truth, images: Tensor) -> Tensor:
    """Maps of other images than those that are judged. No other explainer has them, so their passes are not kept."""
    with shared_passes():
        return explainer.attribute(images, target, truth)


def _without_classes(batch: Sample) -> Sample:
    """A batch without the ground truth of single classes."""
    box = batch.box if batch.box_classes is None else None
    masks = batch.masks if batch.mask_classes is None else None
    return batch._replace(box=box, masks=masks, box_classes=None, mask_classes=None)


def _correct(prediction: Tensor, label: Tensor) -> Tensor | None:
    """Whether each prediction is the label or, of several labels (B, K), one of them: 1, 0, or NaN if the label is
    unknown. None if no label is known."""
    if label.dim() == 2:
        known = label.new_zeros(len(label), int(prediction.max()) + 1)
        known = torch.cat([label, known], dim=1)
        return torch.where(label.any(dim=1), known.gather(1, prediction[:, None])[:, 0].float(), torch.nan)
    return torch.where(label >= 0, (prediction == label).float(), torch.nan) if bool((label >= 0).any()) else None
