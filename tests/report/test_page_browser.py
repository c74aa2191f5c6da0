from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from interp_models.report.page import write_report
from interp_models.report.views import ImageView, MapView, RunSummary
from tests import drive_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        drive_page.CHROMIUM is None or drive_page.CHROMEDRIVER is None,
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]

RUNS = ("br_npa_resnet50", 'resnet50 <plain> & "pooled"')
EXPLAINERS = ("attention", "grad_cam", "score_cam", "rise", "random")
METRICS = ("ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic")
N = 60


def smooth(random: np.random.Generator, size: int) -> np.ndarray:
    """A few blobs on a grid."""
    y, x = np.mgrid[:size, :size][..., None] / size
    centre, width = random.random((2, 3)), random.uniform(0.02, 0.2, 3)
    return np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / width)


def images() -> Iterator[ImageView]:
    random = np.random.default_rng(0)
    for i in range(N):
        image = (255 * smooth(random, 224)).astype(np.uint8)
        maps = [
            MapView(run, explainer, smooth(random, size).sum(2), {metric: random.random() for metric in METRICS})
            for run, size in zip(RUNS, (14, 7), strict=True)
            for explainer in EXPLAINERS
        ]
        predictions = {run: ("blobs" if random.random() < 0.8 else "rings", random.random()) for run in RUNS}
        parts = {RUNS[0]: np.moveaxis(smooth(random, 14), 2, 0)}
        yield ImageView(image, f"image_{i:04d}", "blobs", predictions, maps, parts)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(1)
    protocol = {"preset": "standard", "grid": 14, "steps": 196, "fill": "zero", "target": "predicted"}
    protocol["scorer"] = "exact"
    rows = [
        {"run": run, "explainer": explainer, "metric": metric, "mean": random.random(), "std": 0.1, "n": N}
        | {"n_undefined": 0, "higher_is_better": metric not in ("ad", "dauc"), **protocol}
        for run in RUNS
        for explainer in EXPLAINERS
        for metric in METRICS
    ]
    runs = [RunSummary(run, "model", "blobs", 0.8, N, 0.8, N, 0, "last epoch") for run in RUNS]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title="Blobs", runs=runs, rows=rows, images=images())
    return path


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (420, False), (420, True)])
def test_the_page_shows_every_picture_and_asks_for_nothing(page: Path, width: int, dark: bool) -> None:
    found = drive_page.drive(page, width=width, dark=dark)
    assert found == {
        "images": N * (1 + len(RUNS) * len(EXPLAINERS) + 1),
        "blank": 0,
        "overflow": 0,
        "console_errors": [],
        "outside_requests": [],
    }


def test_a_bad_page_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    good = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    broken = "<img src='data:image/png;base64,AAAA'><img src='http://127.0.0.1:9/x.png' loading='lazy'>"
    path.write_text(f"<img src='{good}'>{broken}<p style='width:9999px'>wide</p><script>fail()</script>")
    found = drive_page.drive(path)
    assert (found["images"], found["blank"]) == (3, 2)
    assert found["overflow"] > 8000
    assert "http://127.0.0.1:9/x.png" in found["outside_requests"]
    assert any("fail is not defined" in message for message in found["console_errors"])
