"""Draws the maps of all explainers on the same images, as a page and two pictures.

python -m studies.gallery --images FOLDER --out OUT     # EfficientNet-Lite0 with its ImageNet weights
python -m studies.gallery --run RUN --out OUT           # the model and the test images of a run

FOLDER holds jpg files. If a method does not apply to the model, the page gives the reason.
"""

import argparse
import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness import imagenet_network
from interp_models import EXPLAINERS, load
from interp_models.core.errors import NotApplicable
from interp_models.core.files import write_whole
from interp_models.core.scoring import logits_of
from interp_models.core.truth import Truth
from interp_models.data.base import decode_image
from interp_models.data.transforms import transform_of
from interp_models.report.visual import Picture, contact_sheet, jpeg_uri, overlay, to_uint8
from interp_models.runs.building import build_data
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config

OPTIONS: dict[str, dict[str, Any]] = {
    "rise": {"masks": 1000},
    "lime": {"samples": 500},
    "kernelshap": {"samples": 500},
    "smoothed_integrated_gradients": {"samples": 5, "steps": 20},
    "integrated_smoothgrad": {"samples": 5, "steps": 20},
}
"""Options of methods whose defaults take thousands of passes."""

Drawn = tuple[str, str, list[Picture] | str, float]
"""Name, options, pictures or the reason why there are none, and seconds per image."""


def images_of_folder(folder: Path, count: int) -> tuple[Tensor, list[str], None]:
    """Images (n, 3, 224, 224) at even distances in the sorted folder, and their names."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(paths) < count:
        raise SystemExit(f"--images: {count} jpg files are needed, the folder holds {len(paths)}")
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    plain = transform_of("crop_flip_jitter", 224).evaluation()
    images = [plain.forward(decode_image(path)).as_subclass(Tensor) for path in chosen]
    return torch.stack(images), [path.stem for path in chosen], None


def images_of_run(run: Path, count: int) -> tuple[Tensor, list[str], Tensor | None]:
    """Test images (n, 3, H, W) at even distances in a run's data, their names, and their boxes if it has boxes."""
    data = build_data(run_config(run))
    dataset = data.dataset("test")
    samples = [dataset[0, i * len(data.test_indices) // count] for i in range(count)]
    names = [Path(data.test_images.image_id(sample.index)).stem for sample in samples]
    boxes = None if samples[0].box is None else torch.stack([sample.box.as_subclass(Tensor) for sample in samples])
    return torch.stack([sample.image.as_subclass(Tensor) for sample in samples]), names, boxes


def draw(model: nn.Module, images: Tensor, boxes: Tensor | None) -> list[Drawn]:
    """The maps of the predicted classes by every registered explainer."""
    with torch.no_grad():
        target = logits_of(model.eval()(images)).argmax(dim=1)
    pictures, drawn = [to_uint8(image) for image in images], list[Drawn]()
    for name in tqdm(EXPLAINERS.names(), desc="explainers"):
        options = OPTIONS.get(name, {})
        start = time.perf_counter()
        try:
            maps = EXPLAINERS.build(name, options, model=model).attribute(images, target, Truth(boxes))
        except NotApplicable as error:
            drawn.append((name, "", str(error), 0.0))
            continue
        seconds = (time.perf_counter() - start) / len(images)
        words = ", ".join(f"{key} {value}" for key, value in options.items())
        laid = [overlay(picture, map_.numpy(), alpha=0.6) for picture, map_ in zip(pictures, maps, strict=True)]
        drawn.append((name, words, laid, seconds))
    return drawn


def page(title: str, images: Sequence[Picture], names: Sequence[str], drawn: Sequence[Drawn]) -> str:
    """A self-contained HTML page."""

    def cell(name: str, picture: Picture) -> str:
        return f'<td><img loading="lazy" alt="{html.escape(name)}" src="{jpeg_uri(picture)}"></td>'

    rows = ["<tr><th>image</th>" + "".join(cell(n, p) for n, p in zip(names, images, strict=True)) + "</tr>"]
    for name, words, pictures, seconds in drawn:
        head = f"<th>{html.escape(name)}<small>{html.escape(words)}</small>"
        if isinstance(pictures, str):
            rows.append(f'<tr>{head}</th><td class="none" colspan="{len(images)}">{html.escape(pictures)}</td></tr>')
        else:
            cells = "".join(cell(f"{name}: {n}", p) for n, p in zip(names, pictures, strict=True))
            rows.append(f"<tr>{head}<small>{seconds:.2g} s per image</small></th>{cells}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    style = """:root { color-scheme: light dark; } body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }
    .scroll { overflow-x: auto; } th { text-align: left; font-weight: 600; padding: .2rem .8rem .2rem 0; }
    small { display: block; font-weight: 400; opacity: .7; } img { width: 224px; display: block; }
    td { padding: 2px; vertical-align: top; } .none { max-width: 40rem; opacity: .8; padding: .5rem; }"""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f"<h1>{html.escape(title)}</h1><p>Maps of the predicted class over the image, each stretched over its own "
        f"values; red is for and blue against it, in maps with values below 0.</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div></body></html>"
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Write `gallery.html`, `gallery-0.png` and `gallery-1.png`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of jpg files")
    source.add_argument("--run", type=Path, help="run folder")
    p.add_argument("--count", type=int, default=4, help="number of images")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    p.add_argument("--out", type=Path, required=True, help="folder of the page and the pictures")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.run:
        model, title = load(args.run)[0], f"All explainers of {run_name(args.run)}"
        images, names, boxes = images_of_run(args.run, args.count)
    else:
        model, title = imagenet_network(), "All explainers of EfficientNet-Lite0"
        images, names, boxes = images_of_folder(args.images, args.count)
    drawn = draw(model, images, boxes)
    pictures = [to_uint8(image) for image in images]
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / "gallery.html"
    write_whole(path, page(title, pictures, names, drawn))
    columns = [("image", pictures), *((name, laid) for name, _, laid, _ in drawn if isinstance(laid, list))]
    small = [[np.asarray(picture)[::2, ::2] for picture in laid] for _, laid in columns]
    half = (len(columns) + 1) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        rows = [list(row) for row in zip(*small[part], strict=True)]
        contact_sheet(rows, [""] * len(rows), [name for name, _ in columns[part]], args.out / f"gallery-{number}.png")
    return path


if __name__ == "__main__":
    print(main())
