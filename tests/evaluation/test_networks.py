"""Networks that were not trained here, through evaluate.py: alone, and beside runs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from interp_models import EXPLAINERS, probabilities
from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError
from interp_models.evaluation.normalisation import IMAGENET
from interp_models.runs.networks import Network, build_network, imported, network_config
from tests.conftest import Script, copy_run

pytestmark = pytest.mark.filterwarnings("ignore:.* does not say how its images are normalised")

PLAN = [
    "explainers=[intrinsic, gradcam]",
    "metrics=[ad, dauc]",
    "max_steps=4",
    "report_images=2",
    "logger.wandb=disabled",
]
FACTORY = """
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )


def pair():
    net = network()

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            z = self.net(x)
            return x.flatten(1), z

    return Pair()


def statistics():
    from interp_models import Classifier

    return Classifier(network(), mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


def ours():
    from interp_models import MODELS

    torch.manual_seed(0)
    return MODELS.build("cnn", {"backbone": "test_resnet", "weights": None}, num_classes=3)


def of_timm():
    import timm
    from interp_models import Classifier

    return Classifier(timm.create_model("test_resnet"), output="softmax")


def one():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))


def labels():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.Hardsigmoid())


def number():
    return 3


def fails():
    raise RuntimeError("no weights\\nhere")
"""


@pytest.fixture
def factory(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A file of a name of its own: a plugin's name stays taken in a process."""
    name = f"factory_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    return f"{tmp_path}/{name}.py"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Seven photographs without labels, of different sizes."""
    folder = tmp_path / "photos" / "deeper"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(7):
        pixels = generator.integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_factory_beside_a_run(
    script: Script, bcnn_run: Path, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the run's images, with values that Python gives; the run's own are what they are without it."""
    monkeypatch.chdir(tmp_path)
    alone, run = copy_run(bcnn_run, tmp_path / "tiny" / "alone"), copy_run(bcnn_run, tmp_path / "tiny" / "run")
    assert script("evaluate", alone, *PLAN, "grid=[4, 4]").code == 0
    network = f"networks=[{{factory: '{factory}:network', image_size: 64, name: own}}]"
    outcome = script("evaluate", run, *PLAN, "grid=[4, 4]", network, f"out={tmp_path / 'both'}")
    assert outcome.code == 0, outcome.err
    values = [pd.read_parquet(one / "evaluation/per_image.parquet")["value"] for one in (alone, run)]
    pd.testing.assert_series_equal(*values)
    rows = json.loads((tmp_path / "both/results.json").read_text())["rows"]
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["tiny/run", "own"]
    results = tmp_path / "runs/networks/own"
    table = pd.read_parquet(results / "per_image.parquet")
    assert set(table["explainer"]) == {"gradcam"}  # it has no maps of its own
    model = build_network(network_config({"factory": f"{factory}:network", "image_size": 64}))
    images = torch.stack([model_input(tmp_path, bcnn_run, image_id) for image_id in table["image_id"].unique()])
    score_fn = probabilities(model.model)
    target = score_fn(images).argmax(dim=1)
    first = table.drop_duplicates("index")
    assert list(first["target_class"]) == target.tolist()
    maps = EXPLAINERS.build("gradcam", model=model.model).attribute(images, target)
    np.testing.assert_allclose(np.load(results / "maps/gradcam.npy"), maps, rtol=1e-3, atol=1e-5)
    page = (tmp_path / "both/report.html").read_text()
    assert "Sequential" in page
    assert "as given" in page


def model_input(tmp_path: Path, run: Path, image_id: str) -> torch.Tensor:
    from interp_models.data.transforms import transform_of
    from interp_models.runs.loading import run_config

    root = Path(run_config(run)["data"]["dataset"]["root"])
    transform = transform_of({"name": "shorter_side", "crop_pct": 0.875, "interpolation": "bicubic"}, 64).evaluation()
    from interp_models.data.base import decode_image

    image: torch.Tensor = transform(decode_image(next(root.rglob(image_id)), upright=False))
    return image


def test_files_without_labels(
    script: Script, tmp_path: Path, files: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["dataset.name=image_files", f"dataset.root={files}"]
    outcome = script("evaluate", f"{factory}:network", *PLAN, *data, "n_images=5", f"out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert "data: 5 of 7 images without labels" in outcome.err
    table = pd.read_parquet(tmp_path / "out/per_image.parquet")
    assert set(table["label"]) == {-1}
    assert table["image_id"].str.match(r"deeper/\d\.png").all()
    before = (tmp_path / "out/results.json").read_bytes()
    again = script("evaluate", f"{factory}:network", *PLAN, *data, "n_images=5", f"out={tmp_path / 'out'}")
    assert "it is not repeated" in again.out
    assert (tmp_path / "out/results.json").read_bytes() == before
    outcome = script("evaluate", f"{factory}:network", *PLAN, *data, "target=label")
    assert outcome.code == 2
    assert outcome.err.endswith("network has other classes than the data set; target=prediction works\n")


def test_a_timm_model_from_a_file_with_its_classifier(
    script: Script, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, "w.pth")
    own = "networks=[{timm: test_resnet, weights: w.pth}]"
    outcome = script("evaluate", own, *PLAN, "dataset.name=image_files", f"dataset.root={files}", "out=out")
    assert outcome.code == 0, outcome.err
    table = pd.read_parquet("out/per_image.parquet").drop_duplicates("index")
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths = [files / name for name in table["image_id"]]
    with torch.no_grad():
        chances = model(torch.stack([prepare(Image.open(path)) for path in paths])).softmax(dim=1)
    np.testing.assert_allclose(table["confidence"], chances.max(dim=1).values, atol=5e-3)  # timm resamples 8 bits
    random = build_network(network_config({"timm": "test_resnet", "weights": None}))
    assert isinstance(random.model, Classifier)
    assert random.image_size == model.pretrained_cfg["input_size"][-1]


def test_a_timm_network_keeps_its_classifier() -> None:
    """The features of a network without it look like logits of another number of classes."""
    expected = timm.create_model("test_resnet").eval()
    found = build_network(network_config({"timm": "test_resnet", "weights": None})).model
    with torch.no_grad():
        assert found.eval()(torch.rand(1, 3, 64, 64)).shape == expected(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_an_output_that_must_be_named(script: Script, tmp_path: Path, files: Path, factory: str) -> None:
    data = ["dataset.name=image_files", f"dataset.root={files}", f"out={tmp_path / 'out'}"]
    outcome = script("evaluate", f"{factory}:pair", *PLAN, *data)
    assert outcome.code == 2
    assert "say which they are with output=NAME or PLACE" in outcome.err
    named = f"networks=[{{factory: '{factory}:pair', output: 1}}]"
    assert script("evaluate", named, *PLAN, *data).code == 0


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("{factory}:nothing", "has no function 'nothing'"),
        ("{factory}:number", "must return a torch.nn.Module; it returned int"),
        ("{factory}:fails", "fails failed: RuntimeError: no weights"),
        ("nowhere.py:f", "nowhere.py does not exist"),
        ("no_such_package.sub:f", "no package of this name is installed"),
        ("timm:resnt18", "unknown timm model 'resnt18'; did you mean 'resnet18'"),
        ("networks=[{{name: x}}]", "each one needs either timm or factory"),
        ("networks=[{{timm: resnet18, factory: 'a:b'}}]", "each one needs either timm or factory"),
        ("networks=[3]", "FILE.py:function, or keys and values; got 3"),
        ("networks=[{{timm: resnet18, weight: x}}]", "unknown key in networks: 'weight'; did you mean 'weights'"),
        ("networks=[{{timm: test_resnet, weights: nowhere.pth}}]", "weights file nowhere.pth does not exist"),
        ("networks=[{{factory: '{factory}:network', normalize: [1, 2, 3]}}]", "normalize must be auto, imagenet, none"),
        ("networks=[{{factory: '{factory}:pair', output: 1.5}}]", "must be the name or place of the logits"),
        ("networks=[{{factory: '{factory}:pair', output: {{a: 1}}}}]", "must be the name or place of the logits"),
        ("networks=[{{factory: '{factory}:network', name: ..}}]", "the name '..' cannot be that of a folder"),
        ("networks=[{{factory: '{factory}:network', name: .}}]", "the name '.' cannot be that of a folder"),
        (
            "networks=[{{factory: '{factory}:statistics', normalize: imagenet}}]",
            "statistics: normalize and output are those of",
        ),
        ("networks=[{{factory: '{factory}:ours', normalize: imagenet}}]", "ours normalises images itself; leave"),
        (
            "networks=[{{factory: '{factory}:statistics', output: sigmoid}}]",
            "statistics: normalize and output are those of",
        ),
    ],
)
def test_refusals(script: Script, files: Path, factory: str, network: str, says: str) -> None:
    data = ["dataset.name=image_files", f"dataset.root={files}"]
    outcome = script("evaluate", network.format(factory=factory), *PLAN, *data)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert says in outcome.err
    assert outcome.err.count("\n") == 1


def test_data_must_be_named(script: Script, factory: str) -> None:
    outcome = script("evaluate", f"{factory}:network", *PLAN)
    assert outcome.code == 2
    assert "dataset.name must be given, as there is no run beside it" in outcome.err


@pytest.mark.slow
def test_two_ranks_write_the_values_of_one(
    script: Script, tmp_path: Path, files: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["dataset.name=image_files", f"dataset.root={files}", "batch_size=2"]
    assert script("evaluate", f"{factory}:network", *PLAN, *data, "out=one").code == 0
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    two = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp"]
    command = [sys.executable, str(root / "evaluate.py"), f"{factory}:network", *PLAN, *data, "out=two", *two]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    tables = [pd.read_parquet(folder / "per_image.parquet") for folder in (Path("one"), Path("two"))]
    np.testing.assert_allclose(tables[0]["value"], tables[1]["value"], atol=1e-5)
    assert list(tables[0]["image_id"]) == list(tables[1]["image_id"])


def test_one_name_for_two_models_is_refused(script: Script, factory: str, files: Path) -> None:
    data = ["dataset.name=image_files", f"dataset.root={files}"]
    outcome = script("evaluate", f"{factory}:network", f"{factory}:network", *PLAN, *data)
    assert "two models have the same name" in outcome.err
    with pytest.raises(InputError, match="each one needs"):
        network_config({})


def test_two_names_of_one_folder_are_refused(
    script: Script, factory: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["dataset.name=image_files", f"dataset.root={files}", "n_images=1"]
    named = "networks=[{{factory: '{0}:network', name: a b}}, {{factory: '{0}:network', name: {1}}}]"
    assert script("evaluate", named.format(factory, "a-b"), *PLAN, *data).code == 0
    assert {path.name for path in Path("runs/networks").iterdir()} == {"a_b", "a-b"}
    outcome = script("evaluate", named.format(factory, "a_b"), *PLAN, *data)
    assert outcome.code == 2
    assert outcome.err == (
        "error: networks 'a b' and 'a_b' would both write to runs/networks/a_b; give one another name\n"
    )


@pytest.mark.parametrize(
    ("function", "says", "output"),
    [
        ("one", "networks: one: the model returns one logit per image, whose softmax is always 1: ", "one_logit"),
        ("labels", "networks: labels: all outputs of Classifier lie in [0, 1], also for noise: pass ", "sigmoid"),
    ],
)
def test_a_network_that_cannot_be_judged_is_refused_before_others_are(
    script: Script,
    factory: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    says: str,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["dataset.name=image_files", f"dataset.root={files}", "n_images=1", "grid=[4, 4]", "explainers=[random]"]
    outcome = script("evaluate", f"{factory}:network", f"{factory}:{function}", *PLAN, *data)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {says}")
    assert f"pass output='{output}'" in outcome.err
    assert not Path("runs").exists()
    right = f"networks=[{{factory: '{factory}:{function}', output: {output}}}]"
    assert script("evaluate", f"{factory}:network", right, *PLAN, *data).code == 0


def test_a_network_of_grey_images_is_refused_in_one_line(
    script: Script, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = "nn.Sequential(nn.Conv2d({1}, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())"
    lines = f"from torch import nn\n\n\ndef {{0}}():\n    return {body}\n"
    Path("channels.py").write_text(lines.format("rgb", 3) + "\n\n" + lines.format("grey", 1))
    data = ["dataset.name=image_files", f"dataset.root={files}", "n_images=1", "grid=[4, 4]", "explainers=[random]"]
    assert script("evaluate", "channels.py:rgb", *PLAN, *data).code == 0
    outcome = script("evaluate", "channels.py:grey", *PLAN, *data)
    assert outcome.code == 2
    assert outcome.err.startswith("error: networks: grey: Classifier does not take images of shape (3, 224, 224): ")


def test_auto_normalises_as_judge_does(factory: str) -> None:
    """Its statistics are ImageNet's unless the network says otherwise."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def network(function: str, **options: object) -> Network:
        return build_network(network_config({"factory": f"{factory}:{function}", **options}))

    plain = network("network", normalize="none").model
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    expected = plain((images - mean) / std)
    torch.testing.assert_close(network("statistics").model(images), expected)
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in IMAGENET)
    with pytest.warns(UserWarning, match="does not say how its images are normalised: ImageNet's mean and standard"):
        found = network("network")
    torch.testing.assert_close(found.model(images), plain((images - mean) / std))
    ours = imported(f"{factory}:ours")().eval()
    torch.testing.assert_close(network("ours").model(images), ours(images).logits)
    wrapped = network("of_timm")  # a Classifier without statistics normalises nothing; its size is the network's
    assert wrapped.model.mean is None
    assert wrapped.image_size == timm.create_model("test_resnet").pretrained_cfg["input_size"][-1]
    assert found.image_size == 224
