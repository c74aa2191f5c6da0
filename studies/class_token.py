"""Where the class token's attention looks before and after fine-tuning: pointing and energy, by head and of their mean.

python -m studies.class_token --runs runs/cub_vit_cls_dinov2/0-0 [...]

*Before* is the model as its config builds it. `pointing` and `energy` are the metrics of `box_localisation`, on maps
that are upsampled to the image.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from interp_models import METRICS, InterpModule, load
from interp_models.core.truth import Truth, in_boxes
from interp_models.data.base import Sample
from interp_models.data.module import DataModule
from interp_models.metrics import Case
from interp_models.runs.building import build_data, build_model
from interp_models.runs.loading import run_config


def in_box(maps: Tensor, batch: Sample) -> tuple[Tensor, Tensor]:
    """`pointing` and `energy` of maps (B, N, h, w) of a batch with boxes, each (B, N)."""
    metric, truth = METRICS.build("box_localisation", {"wanted": ["pointing", "energy"]}), Truth(batch.box)
    found = [metric.score(Case(batch.image, one, truth=truth)) for one in maps.unbind(dim=1)]
    pointing, energy = (torch.stack([values[key] for values in found], dim=1) for key in ("pointing", "energy"))
    return pointing, energy


@torch.no_grad()
def attention(model: InterpModule, data: DataModule, what: str) -> list[Row]:
    """Means over the test images: of the mean over heads, then of each head."""
    model.eval()
    hits, energies = [], []
    for batch in tqdm(data.test_dataloader(), desc=what, leave=False):
        if batch.box is None:
            raise SystemExit("--runs: the data have no boxes")
        heads = model(batch.image).maps
        maps = torch.cat([heads.mean(dim=1, keepdim=True), heads], dim=1)
        found = in_box(maps, batch)
        hits.append(found[0])
        energies.append(found[1])
    rows: list[Row] = []
    for name, values in (("pointing", hits), ("energy", energies)):
        means = (100 * torch.cat(values).mean(dim=0)).tolist()
        labels = ["mean over heads", *(f"head {number}" for number in range(len(means) - 1))]
        rows += [Value(f"{what}: {name}, {label}", mean, "%") for label, mean in zip(labels, means, strict=True)]
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--runs", type=Path, nargs="+", required=True, help="runs of `vit_cls`")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.command = f"python -m studies.class_token --runs {' '.join(map(str, args.runs))}"
    rows: list[Row] = []
    before: set[str] = set()
    for folder in args.runs:
        config = run_config(folder)
        data = build_data(config)
        if config["experiment"] not in before:
            before.add(config["experiment"])
            torch.manual_seed(0)
            untrained = build_model(config, len(data.classes))
            rows += attention(untrained, data, f"{config['experiment']}, before")
            sizes = [
                in_boxes(batch.box, (batch.image.shape[2], batch.image.shape[3])).float()
                for batch in data.test_dataloader()
            ]
            rows.append(
                Value(f"{config['experiment']}: box, share of the image", 100 * float(torch.cat(sizes).mean()), "%")
            )
        rows += attention(load(folder)[0], data, f"{config['experiment']}, seed {config['seed']}")
    return write("class_token", args, "test images of the runs", rows)


if __name__ == "__main__":
    print(main())
