"""What the last stages of prototype models do to their accuracy: push, last layer, pruning, projection.

python -m studies.prototype_stages --name protopnet --runs RUN [RUN ...] --stages push fit_last_layer prune
    [--reference RUN ...] [--save]

The runs are of one model with several seeds, trained with `on_end: []` in their last phase. After each stage all test
images are classified. Results per image are averaged over the seeds before the bootstrap; differences are paired.
`--save` keeps the finished models as `<run>-finished`, so that they can be evaluated.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import seed_everything
from torch import Tensor

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from interp_models import InterpModule, load
from interp_models.config.loading import save_yaml
from interp_models.core.files import write_json
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample
from interp_models.models.prototree import ProtoTree
from interp_models.prototypes.sources import Prototypical
from interp_models.runs.building import build_data
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config
from interp_models.training.checkpoints import read_checkpoint
from studies.trained import bootstrap

CLOSE = 0.1
"""A decision is close if its probability differs from 1/2 by less."""
PerImage = dict[str, NDArray[np.float64]]


@torch.no_grad()
def classified(model: InterpModule, batches: Sequence[Sample]) -> PerImage:
    """Values per image: 1 where the prediction is right, and the model's own statistics."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for batch in batches:
        output = model(batch.image)
        values = {"acc": (output.logits.argmax(dim=1) == batch.label).float(), **model.measure(output, batch.label)}
        if isinstance(model, ProtoTree):
            values |= {"margin": margin(model, output), "likeliest_leaf": output.aux["paths"].amax(dim=1)}
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def margin(model: ProtoTree, output: InterpOutput) -> Tensor:
    """Distance from 1/2 of the closest decision on each image's greedy path, (B,)."""
    away = ((-output.aux["distances"]).exp() - 0.5).abs().masked_fill(~model.nodes_kept, torch.inf)
    node = model.decide(output) + len(away[0])
    closest = torch.full_like(away[:, 0], torch.inf)
    while bool(node.any()):
        node = (node - 1) // 2
        closest = closest.minimum(away.gather(1, node[:, None])[:, 0])
    return closest


def kept(model: InterpModule) -> int:
    """Number of prototypes that are not removed."""
    assert isinstance(model, Prototypical)
    return int(model.prototype_classes.any(dim=1).sum())


def stages_of(folder: Path, stages: Sequence[str], save: bool) -> tuple[list[PerImage], list[int]]:
    """Values per image after each stage, and the numbers of prototypes left; first those of the model as trained."""
    model, _ = load(folder, "last")
    config = run_config(folder)
    seed_everything(config["seed"])
    data = build_data(config)
    batches = list(data.test_dataloader())
    results, prototypes = [classified(model, batches)], [kept(model)]
    for stage in stages:
        with torch.no_grad():
            getattr(model, stage)(data)
        results.append(classified(model.eval(), batches))
        prototypes.append(kept(model))
        print(f"{folder}, {stage}: {100 * results[-1]['acc'].mean():.2f} %, {prototypes[-1]} prototypes", flush=True)
    if save:
        out = folder.with_name(f"{folder.name}-finished")
        shutil.copytree(folder, out)
        config["phases"][-1]["on_end"] = list(stages)
        save_yaml(out / "config.yaml", config)
        checkpoint = read_checkpoint(out / "checkpoints/last.ckpt")
        checkpoint["state_dict"] = model.state_dict()
        torch.save(checkpoint, out / "checkpoints/last.ckpt")
        means = {f"test/{name}": float(value.mean()) for name, value in results[-1].items()}
        write_json(out / "metrics.json", {**means, "test/n": len(results[-1]["acc"])})
    return results, prototypes


def measure(folders: Sequence[Path], stages: Sequence[str], reference: Sequence[Path], save: bool) -> list[Row]:
    """All rows: each stage by seed, its mean, and paired differences from the stage before and from the reference."""
    per_seed = [stages_of(folder, stages, save) for folder in folders]
    rows: list[Row] = []
    others = []
    for folder in reference:
        model, _ = load(folder)
        others.append(classified(model, list(build_data(run_config(folder)).test_dataloader()))["acc"])
        rows.append(Value(f"{run_name(folder)}: accuracy", 100 * others[-1].mean(), "%"))
    before: NDArray[np.float64] | None = None
    for number, stage in enumerate(["as trained", *stages]):
        name = stage if number == 0 else f"{number}. after {stage}"
        for folder, (results, prototypes) in zip(folders, per_seed, strict=True):
            where = f"{name}, {run_name(folder)}"
            rows.append(Value(f"{where}: prototypes", prototypes[number], ""))
            for key, value in results[number].items():
                share = key.startswith(("acc", "fidelity"))
                rows.append(Value(f"{where}: {key}", (100 if share else 1) * float(value.mean()), "%" if share else ""))
        mean = np.mean([results[number]["acc"] for results, _ in per_seed], axis=0)
        rows += interval(f"{name}: accuracy", mean, "%")
        for key in ("acc_sample_max", "acc_greedy"):
            if key in per_seed[0][0][number]:
                decided = np.mean([results[number][key] for results, _ in per_seed], axis=0)
                rows += interval(f"{name}: {key} minus soft", decided - mean, "points")
        if before is not None:
            rows += interval(f"{name}: accuracy minus that before", mean - before, "points")
        before = mean
        if "margin" in per_seed[0][0][number]:
            margins, agree = (
                np.concatenate([results[number][key] for results, _ in per_seed])
                for key in ("margin", "fidelity_greedy")
            )
            close = margins < CLOSE
            rows.append(Value(f"{name}: images with a decision within {CLOSE} of 1/2", 100 * close.mean(), "%"))
            for which, these in (("of them", close), ("of the others", ~close)):
                if these.any():
                    rows.append(Value(f"{name}: fidelity_greedy {which}", 100 * agree[these].mean(), "%"))
    if others and before is not None:
        rows += interval("at the end: accuracy minus the reference's", before - np.mean(others, axis=0), "points")
    return rows


def interval(what: str, per_image: NDArray[np.float64], unit: str) -> list[Row]:
    """Rows of a mean and the ends of its 95 % interval."""
    mean, low, high = bootstrap(per_image)
    ends = ((what, mean), (f"{what}, lower end of 95 %", low), (f"{what}, upper end of 95 %", high))
    return [Value(name, 100 * value, unit) for name, value in ends]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `<name>.json`."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--runs", type=Path, nargs="+", required=True, help="runs of one model with several seeds")
    p.add_argument("--reference", type=Path, nargs="*", default=[], help="runs of the model to compare with")
    p.add_argument("--stages", nargs="+", required=True, help="methods of the model that are called in turn")
    p.add_argument("--save", action="store_true", help="keep the finished models")
    p.add_argument("--name", required=True, help="name of the file of results")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    runs_, reference = (" ".join(map(run_name, folders)) for folders in (args.runs, args.reference))
    args.command = (
        f"python -m studies.prototype_stages --name {args.name} --runs {runs_} --stages {' '.join(args.stages)}"
        + (f" --reference {reference}" if reference else "")
    )
    return write(args.name, args, "test images of the runs", measure(args.runs, args.stages, args.reference, args.save))


if __name__ == "__main__":
    print(main())
