"""Accuracy of trained runs with paired bootstrap intervals, and where their attention maps point.

python -m studies.trained --runs runs/cub_cnn_lite0/0-0 [...]                writes a record of each run
python -m studies.trained --name cub --records cub_cnn_lite0-0 cub_bcnn_lite0-0 [...]     makes a table of them

A record, `results/trained/<experiment>-<seed>.json`, holds what was measured and which images were classified rightly.
So runs of different days can be compared image by image. All models are compared with the model of the first record.
Records of one model with several seeds are averaged per image before the bootstrap.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from interp_models import METRICS, InterpModule, load
from interp_models.core.truth import Truth
from interp_models.data.base import Sample
from interp_models.data.subsets import spread
from interp_models.explainers.cam import GradCAM
from interp_models.explainers.controls import CenterGaussian
from interp_models.explainers.rise import RISE
from interp_models.metrics import Case
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config

RESAMPLES = 10_000
FOLDER = "trained"
"""Folder of the records, inside that of the results."""


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean of values per image, and the ends of its 95 % interval by the percentile bootstrap over the images.

    >>> bootstrap(np.ones(10))
    (1.0, 1.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def hits(maps: Tensor, batch: Sample) -> NDArray[np.float64]:
    """`pointing` of the maps (B, h, w) of a batch with boxes."""
    metric = METRICS.build("box_localisation", {"wanted": ["pointing"]})
    found: NDArray[np.float64] = metric.score(Case(batch.image, maps, truth=Truth(batch.box)))["pointing"].numpy()
    return found.astype(np.float64)


def pairwise_cosine(maps: Tensor) -> Tensor:
    """Mean cosine between pairs of an image's maps (B, N, h, w), (B,); 0 for pairs with a map that is 0."""
    unit = F.normalize(maps.flatten(2), dim=2)
    gram = unit @ unit.transpose(1, 2)
    n = gram.shape[1]
    off = gram.sum(dim=(1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    return off / (n * (n - 1))


@torch.no_grad()
def attention(model: InterpModule, batches: Sequence[Sample]) -> dict[str, NDArray[np.float64]]:
    """Per image: correct, pointing hits of own map, Grad-CAM and centre, cosine between maps. Per map: dead."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    alive: Tensor | None = None
    for batch in batches:
        output = model(batch.image)
        predicted = output.logits.argmax(dim=1)
        values = {"correct": (predicted == batch.label).double().numpy()}
        if batch.box is not None:
            own, gradcam = model.explain(output, predicted), GradCAM(model).attribute(batch.image, predicted)
            control = CenterGaussian(model).attribute(batch.image)
            for name, maps in (("own map", own), ("Grad-CAM", gradcam), ("centre Gaussian", control)):
                values[f"pointing hits of {name}"] = hits(maps, batch)
        if output.maps.shape[1] > 1:
            values["mean cosine between maps"] = pairwise_cosine(output.maps).double().numpy()
            live = (output.maps.amax(dim=(2, 3)) > 0).any(dim=0)
            alive = live if alive is None else alive | live
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    if alive is not None:
        joined["dead maps"] = (~alive).double().numpy()
    return joined


def rise_stability(model: InterpModule, images: Tensor, few: int, many: int) -> NDArray[np.float64]:
    """Pearson correlation of each image's RISE maps with few masks and with many, of which the few are the first."""
    a = RISE(model, masks=few).attribute(images).flatten(1)
    b = RISE(model, masks=many).attribute(images).flatten(1)
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)])


def record(folder: Path) -> tuple[str, list[Row], dict[str, Any]]:
    """A run's name, its rows, and more keys of its record: `correct` has a digit for each test image."""
    model, _ = load(folder)
    config = run_config(folder)
    data = build_data(config)
    values = attention(model, list(data.test_dataloader()))
    correct = values.pop("correct")
    rows: list[Row] = [Value("test accuracy", 100 * correct.mean(), "%")]
    if "dead maps" in values:
        rows.append(Value("dead maps", float(values.pop("dead maps").sum()), "maps"))
    for what, each in values.items():
        share = what.startswith("pointing")
        if (known := each[~np.isnan(each)]).size:  # a constant map points nowhere
            rows.append(Value(what, (100 if share else 1) * float(known.mean()), "%" if share else ""))
    digits = "".join(str(int(one)) for one in correct)
    of_run = {"experiment": config["experiment"], "run_seed": config["seed"], "test_images": data.fingerprint("test")}
    return f"{config['experiment']}-{config['seed']}", rows, {**of_run, "correct": digits}


def compare(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """All rows: by run, by model over its seeds, and the differences from the first model.

    Raises:
        SystemExit: if two records have different test images.
    """
    rows: list[Row] = []
    correct: dict[str, list[NDArray[np.float64]]] = {}
    for each in records:
        if each["test_images"] != records[0]["test_images"]:
            raise SystemExit(f"{each['experiment']} has other test images than {records[0]['experiment']}")
        name = f"{each['experiment']}, seed {each['run_seed']}"
        rows += [Value(f"{name}: {row['what']}", row["value"], row["unit"]) for row in each["values"]]
        correct.setdefault(each["experiment"], []).append(np.array(list(each["correct"]), dtype=np.float64))
    means = {name: np.mean(seeds, axis=0) for name, seeds in correct.items()}
    reference = next(iter(means))
    for name, per_image in means.items():
        what = f"{name}, mean of {len(correct[name])} seed(s)"
        mean, low, high = bootstrap(per_image)
        rows += [Value(f"{what}: {part}", 100 * value, "%") for part, value in _interval("accuracy", mean, low, high)]
        if name != reference:
            mean, low, high = bootstrap(per_image - means[reference])
            difference = f"accuracy minus that of {reference}"
            rows += [Value(f"{what}: {part}", 100 * v, "points") for part, v in _interval(difference, mean, low, high)]
    return rows


def _interval(what: str, mean: float, low: float, high: float) -> list[tuple[str, float]]:
    return [(what, mean), (f"{what}, lower end of 95 %", low), (f"{what}, upper end of 95 %", high)]


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Measure runs and write their records, or compare records and write `<name>.json`."""
    p = plain_parser(__doc__, STUDIES)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", type=Path, nargs="+", help="folders of runs to measure")
    what.add_argument("--records", nargs="+", help="names of records to compare")
    p.add_argument("--name", help="name of the file of results, with --records")
    p.add_argument(
        "--stability", type=int, default=0, help="images on which the stability of RISE is measured, with the first run"
    )
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.records:
        if not args.name:
            p.error("--records needs --name")
        if args.stability:
            p.error("--stability is measured on a run: give --runs")
        args.command = f"python -m studies.trained --name {args.name} --records {' '.join(args.records)}"
        found = [json.loads((args.out / FOLDER / f"{name}.json").read_text()) for name in args.records]
        return [write(args.name, args, "test images of the runs", compare(found))]
    if args.name:
        p.error("--name is of a comparison: give --records")
    paths = []
    if args.stability:
        args.command = f"python -m studies.trained --runs {args.runs[0]} --stability {args.stability}"
        paths.append(write("rise_stability", args, "test images of the run", stable(args.runs[0], args.stability)))
    args.out /= FOLDER
    for folder in args.runs:
        args.command = f"python -m studies.trained --runs {folder}"
        name, rows, of_run = record(folder)
        paths.append(write(name, args, "test images of the run", rows, of_run))
    return paths


def stable(folder: Path, n: int) -> list[Row]:
    """Stability of RISE on n test images of a run: correlation of maps with 500 and with 1000 masks."""
    model, _ = load(folder)
    data = build_data(run_config(folder)).dataset("test")
    images = torch.stack([data[0, position].image for position in spread(len(data), n)])
    each = rise_stability(model, images.as_subclass(Tensor), 500, 1000)
    return [
        Value("RISE, correlation of maps with 500 and 1000 masks, median", float(np.median(each)), ""),
        Value("RISE, correlation of maps with 500 and 1000 masks, lowest", float(each.min()), ""),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
