"""The page in Chromium: it shows all of its pictures, asks for nothing, and every control does what it says."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_models.evaluation.comparison import results_of
from interp_models.evaluation.judgement import Judgement
from interp_models.report import numbers, visual
from interp_models.report.page import write_report
from interp_models.report.views import ImageView, MapView, RunResults, RunSummary
from tests import drive_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        drive_page.CHROMIUM is None or drive_page.CHROMEDRIVER is None,
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]

RUNS = ("br_npa_resnet50", 'resnet50 <plain> & "pooled"')
EXPLAINERS = ("intrinsic", "gradcam", "scorecam", "rise", "random")
METRICS = ("ad", "iic", "add", "ag", "dauc", "dc", "iauc", "energy")
N = 60


def smooth(random: np.random.Generator, size: int) -> np.ndarray:
    """A few blobs on a grid."""
    y, x = np.mgrid[:size, :size][..., None] / size
    centre, width = random.random((2, 3)), random.uniform(0.02, 0.2, 3)
    return np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / width)


def images(n: int = N, explainers: tuple[str, ...] = EXPLAINERS, fine: int = 1) -> Iterator[ImageView]:
    """Views of n images; `fine` of the explainers have maps as fine as the image."""
    random = np.random.default_rng(0)
    at = np.linspace(0, 1, 50)
    for i in range(n):
        image = (255 * smooth(random, 224)).astype(np.uint8)
        maps = []
        for run, size in zip(RUNS, (14, 7), strict=True):
            wrong = i % 5 == 0
            for place, explainer in enumerate(explainers):
                own = smooth(random, 224 if place < fine else size).sum(2)
                scores = {metric: random.random() for metric in METRICS}
                curves = {"dauc": np.stack([at, 1 - at * random.random()])}
                label = smooth(random, size).sum(2) if wrong else None
                maps.append(MapView(run, explainer, own, scores, curves, label))
        predictions = {run: ("rings" if i % 5 == 0 else f"blobs {i % 3}", float(random.random())) for run in RUNS}
        parts = {RUNS[0]: np.moveaxis(smooth(random, 14), 2, 0)}
        yield ImageView(image, f"image_{i:04d}", f"blobs {i % 3}", predictions, maps, parts)


def results(explainers: tuple[str, ...] = EXPLAINERS) -> list[RunResults]:
    random = np.random.default_rng(1)
    protocol = {"preset": "standard", "grid": "14x14", "steps": 196, "fill": "zero", "target": "predicted"}
    protocol |= {"scorer": "exact", "n": N, "n_undefined": 0}
    found = []
    for run in RUNS:
        rows: list[dict[str, Any]] = [
            {"run": run, "explainer": explainer, "metric": metric, "mean": (mean := random.random()), "std": 0.1}
            | {
                "low": mean - 0.1,
                "high": mean + 0.1,
                "rank": 1 + place,
                "tied": False,
                "best": place == 0,
                "options": {"name": explainer},
            }
            | {"higher_is_better": metric not in ("ad", "dauc"), **protocol}
            for place, explainer in enumerate(explainers)
            for metric in METRICS
        ]
        away = [
            {
                "explainer": row["explainer"],
                "metric": row["metric"],
                "reference": explainers[0],
                "mean": 0.1,
                "low": 0.0,
            }
            | {"high": 0.2, "n": N, "p": 0.01, "superiority": 0.6, "verdict": "better"}
            for row in rows
            if row["explainer"] != explainers[0]
        ]
        at = np.broadcast_to(np.linspace(0, 1, 50), (N, 50))
        curves = {name: {"dauc": np.stack([at, 1 - at * random.random()], 1).astype(np.float32)} for name in explainers}
        costs = {name: {"passes": float(place), "seconds": 0.5} for place, name in enumerate(explainers)}
        ranks = {name: (1.0 + place, 0.5) for place, name in enumerate(explainers)}
        said: dict[str, Any] = {"headline": "The `own` map is told apart.", "notes": ["Few images."]}
        found.append(RunResults(run, rows, costs, ranks, away, curves=curves, controls=["random"], **said))
    return found


def summaries() -> list[RunSummary]:
    return [RunSummary(run, "model", "blobs", 0.8, N, 0.8, N, 0, "last epoch") for run in RUNS]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title="Blobs", runs=summaries(), results=results(), images=images())
    return path


@pytest.fixture(scope="module")
def session(page: Path) -> Iterator[drive_page.Session]:
    with drive_page.browser() as opened:
        opened.protocol(
            "Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False
        )
        opened.open(page.resolve().as_uri())
        yield opened


def run(session: drive_page.Session, script: str) -> Any:
    """The result of a script; `all` and `one` select elements, and `wait` waits for drawing."""
    tools = (
        "const all = (s, r = document) => [...r.querySelectorAll(s)], one = (s, r = document) => r.querySelector(s);"
        "const wait = ms => new Promise(go => setTimeout(go, ms)), done = arguments[arguments.length - 1];"
        "const choose = (name, value) => { const field = one(`#filters [name=${name}]`); field.value = value;"
        " field.dispatchEvent(new Event('change', {bubbles: true})); };"
        "const names = () => all('#views > .view:not([hidden]) h3').map(h => h.textContent);"
    )
    body = f"(async () => {{ {script} }})().then(done, error => done(String(error)));"
    return session("POST", "/execute/async", {"script": tools + body, "args": []})


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (390, False), (390, True)])
def test_the_page_shows_every_picture_and_asks_for_nothing(page: Path, width: int, dark: bool) -> None:
    found = drive_page.drive(page, width=width, dark=dark)
    assert found["images"] >= N
    assert {key: value for key, value in found.items() if key != "images"} == {
        "blank": 0, "overflow": 0, "console_errors": [], "outside_requests": [],
    }  # fmt: skip


def data_of_images() -> list[ImageView]:
    return list(images())


def test_maps_are_drawn_with_their_colours(session: drive_page.Session) -> None:
    found = run(
        session,
        """one('#views').scrollIntoView(); await wait(1500);
        // Of a wrong prediction, the map of the true class comes second: gradcam, 14 × 14 cells, is the third.
        const canvas = all('.view:not([hidden]) .run:first-of-type canvas')[2];
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, canvas.height, [...pixels].filter((_, i) => i % 4 < 3)];""",
    )
    width, height, pixels = found
    heat, cmap = visual.heat(data_of_images()[0].maps[1].heatmap)
    from matplotlib import colormaps

    expected = colormaps[cmap](visual.resize(heat, (height, width)), bytes=True)[..., :3].astype(int)
    away = np.abs(np.array(pixels).reshape(height, width, 3) - expected)
    assert away.mean() < 2
    assert np.percentile(away, 99) < 12


def test_filters_leave_what_fits(session: drive_page.Session) -> None:
    every = [f"image_{i:04d}" for i in range(N)]
    assert run(session, "return names()") == every
    assert run(session, "choose('class', 'blobs 1'); return names()") == every[1::3]
    assert run(session, "choose('right', 'false'); return names()") == [every[i] for i in range(1, N, 3) if i % 5 == 0]
    assert run(session, "return one('#filters output').textContent") == "4 of 60 images"
    assert run(session, "choose('class', ''); choose('right', 'true'); return names().length") == 48
    shown = run(
        session, f"choose('run', {json.dumps(RUNS[1])}); return all('.run:not([hidden]) h4').map(h => h.textContent)"
    )
    assert set(shown) == {RUNS[1]}
    assert run(session, "choose('run', ''); choose('right', ''); return names()") == every


def test_sorting_orders_by_what_it_says(session: drive_page.Session) -> None:
    views = data_of_images()

    def order(key: Any) -> list[str]:
        return [view.image_id for view in sorted(views, key=key)]

    run(session, f"choose('run', {json.dumps(RUNS[1])})")
    unsure = order(lambda view: round(view.predictions[RUNS[1]][1], 5))
    assert run(session, "choose('sort', 'unsure'); return names()") == unsure
    assert run(session, "choose('sort', 'sure'); return names()") == unsure[::-1]

    def score(view: ImageView) -> float:
        return -next(m.scores["ad"] for m in view.maps if m.run == RUNS[1] and m.explainer == "rise")  # type: ignore[operator]  # none of these scores is None

    script = "choose('sort', 'score'); choose('first', 'rise'); choose('metric', 'ad'); return names()"
    assert run(session, script) == order(score)  # a high drop is the worst

    def alike(view: ImageView) -> float:
        from interp_models.report.agreement import of_maps

        maps = {m.explainer: m.heatmap for m in view.maps if m.run == RUNS[1]}
        return round(float(of_maps(list(maps.values()))[list(maps).index("rise"), list(maps).index("gradcam")]), 3)

    script = "choose('sort', 'pair'); choose('first', 'rise'); choose('second', 'gradcam'); return names()"
    assert run(session, script) == order(alike)
    first = run(session, "choose('sort', 'maps'); return names()")
    assert sorted(first) == sorted(unsure)
    assert first != order(lambda view: view.image_id)
    run(session, "choose('sort', ''); choose('run', '')")


def test_a_map_is_enlarged_with_its_scores_and_curves(session: drive_page.Session) -> None:
    script = """one('#views').scrollIntoView(); await wait(800);
        all('.view:not([hidden]) .open')[0].click(); await wait(800);
        const dialog = one('#zoom');
        return [dialog.open, one('#zoom-title').textContent, all('td', dialog).map(td => td.textContent),
                all('svg', dialog).length, one('.large canvas', dialog).width];"""
    opened, title, cells, charts, width = run(session, script)
    view = data_of_images()[0]
    assert opened
    assert (title, charts, width) == ("intrinsic (predicted class) · image_0000", 1, 448)
    assert cells == [numbers.number(metric, view.maps[0].scores[metric]) for metric in METRICS]
    script = """const dialog = one('#zoom'), title = () => one('#zoom-title').textContent, found = [];
        one('[name=after]', dialog).click(); await wait(100); found.push(title());
        dialog.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})); await wait(100);
        found.push(title());
        one('[name=before]', dialog).click(); await wait(100); found.push(title());
        one('[name=alone]', dialog).click();
        found.push(getComputedStyle(one('canvas', dialog)).opacity, one('[name=alone]').ariaPressed);
        const slider = one('input', dialog); slider.value = 25; slider.dispatchEvent(new Event('input'));
        found.push(getComputedStyle(one('.view canvas')).opacity);
        one('form button', dialog).click(); found.push(dialog.open);
        return found;"""
    assert run(session, script) == [
        "intrinsic (true class) · image_0000", "gradcam (predicted class) · image_0000",
        "intrinsic (true class) · image_0000", "1", "true", "0.25", False,
    ]  # fmt: skip


def test_explainers_can_be_hidden(session: drive_page.Session) -> None:
    script = """one('#views').scrollIntoView(); await wait(800);
        const shown = () => new Set(all('.view:first-child .maps figcaption').map(c => c.firstChild.textContent));
        const before = shown().has('rise'), box = one('#shown input[value=rise]');
        box.click(); await wait(200);
        const after = shown().has('rise'); box.click(); await wait(200);
        return [before, after, shown().has('rise')];"""
    assert run(session, script) == [True, False, True]


def test_tables_are_sorted_by_their_numbers(session: drive_page.Session) -> None:
    for place, one in enumerate(results()):
        means = {row["explainer"]: row["mean"] for row in one.rows if row["metric"] == "dauc"}
        script = f"""const head = all('.sortable thead th').find(th => th.textContent.startsWith('DAUC'));
            const read = () => all('tr:not(.title) th', one('.sortable').tBodies[{place}]).map(th => th.dataset.value);
            head.removeAttribute('aria-sort');
            one('button', head).click(); const up = read(); one('button', head).click();
            return [up, read(), head.getAttribute('aria-sort')];"""
        up = sorted(means, key=lambda name: means[name])
        assert run(session, script) == [up, up[::-1], "descending"]


def test_families_of_metrics_can_be_hidden(session: drive_page.Session) -> None:
    script = """const heads = () => all('.sortable thead th:not([hidden])').map(th => th.textContent);
        const before = heads().length, box = one('.families input[value=localisation]');
        box.click(); const after = heads(); box.click();
        return [before - after.length, after.some(text => text.startsWith('ENERGY')), heads().length === before];"""
    assert run(session, script) == [1, False, True]


def test_tables_are_saved_as_files(session: drive_page.Session) -> None:
    script = """const saved = [], keep = URL.createObjectURL;
        URL.createObjectURL = blob => { saved.push(blob.text()); return keep(blob); };
        const links = []; HTMLAnchorElement.prototype.click = function () { links.push(this.download); };
        all('.exports button').slice(0, 4).forEach(button => button.click());
        URL.createObjectURL = keep;
        return [links, await Promise.all(saved)];"""
    links, texts = run(session, script)
    assert links == [f"br_npa_resnet50.{ending}" for ending in ("csv", "md", "intervals.tex", "std.tex")]
    assert texts[0].startswith("run,explainer,metric,mean")
    assert texts[1].startswith("| explainer | AD % ↓")
    assert all(text.startswith("\\begin{tabular}") for text in texts[2:])


def test_curves_can_be_chosen(session: drive_page.Session) -> None:
    script = """const seen = () => all('.charts:first-of-type .curve:not(.off)').map(g => g.dataset.explainer);
        const boxes = all('.explainers')[0], before = seen(); one('input[value=rise]', boxes).click();
        const after = seen(); one('input[value=rise]', boxes).click();
        return [before.includes('rise'), after.includes('rise')];"""
    assert run(session, script) == [True, False]


def test_in_print_every_shown_image_has_its_maps(session: drive_page.Session) -> None:
    script = """choose('class', 'blobs 1'); await wait(300);
        dispatchEvent(new Event('beforeprint'));
        const filled = all('.view').filter(view => all('.maps figure', view).length);
        const bare = filled.flatMap(view => all('.stack', view)).filter(s => !one('canvas', s) && !one('img + img', s));
        const found = [filled.length, bare.length];
        dispatchEvent(new Event('afterprint')); await wait(800);
        found.push(all('.view').filter(view => all('.maps figure', view).length).length < 20);
        choose('class', ''); return found;"""
    assert run(session, script) == [20, 0, True]


def test_what_is_far_away_is_not_kept(session: drive_page.Session) -> None:
    """Of 60 images with 12 maps each, only those near the window are drawn, and the page does not jump."""
    show = """const views = [...document.querySelectorAll('.view')];
        const drawn = place => views[place].querySelector('canvas');
        views[%d].scrollIntoView({behavior: 'instant'});  // again and again: what is drawn moves what is below it
        return """
    session.until(show % 0 + "drawn(0)")
    session.until(show % 55 + "drawn(55) && !drawn(0)")
    assert run(session, "return all('canvas').length") < 60 * 12 / 3


@pytest.mark.parametrize(("n", "explainers"), [(500, 20)])
def test_a_large_page_opens_in_two_seconds(n: int, explainers: int, tmp_path: Path) -> None:
    """Its size is bounded, and only what is near the window is drawn; benchmarks/pages.py has the times."""
    names = tuple(f"method {number}" for number in range(explainers))
    path = tmp_path / "report.html"
    write_report(path, title="Large", runs=summaries(), results=results(names), images=images(n, names, fine=0))
    assert path.stat().st_size < 100e6
    with drive_page.browser() as opened:
        start = time.monotonic()
        opened.open(path.resolve().as_uri())
        assert run(opened, "return names().length") == n
        assert time.monotonic() - start < 60  # a bound that only a page that draws everything breaks


def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from interp_models import judge

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    names = ["gradcam", "gradient", "random"]
    judge(net.eval(), torch.rand(8, 3, 32, 32), names, ["ad", "dauc", "gini"], folder=tmp_path, progress=False)
    found = Judgement.load(tmp_path)
    page = found.report(tmp_path / "page.html")
    table = found.per_image
    said = results_of(found.tables.rows[0]["run"], found.tables)
    with drive_page.browser() as opened:
        opened.open(page.resolve().as_uri())
        cells = run(opened, "return all('.sortable tbody td[data-value]').map(td => [td.firstChild.textContent])")
        signs = run(opened, "return all('.verdicts tbody td').map(td => td.className)")
    shown = [cell[0] for cell in cells]
    for name in names:
        for key in ("ad", "dauc", "gini"):
            own = table[(table["explainer"] == name) & (table["metric"] == key)]["value"]
            assert numbers.number(key, own.mean()) in shown
    assert signs == [one["verdict"] for one in said.differences]


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
