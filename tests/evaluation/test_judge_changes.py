"""`judge` judges anew what has changed, and leaves the files and objects of others as they are."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from interp_models import Classifier, InputError, judge
from interp_models.core import prepared
from interp_models.core.digests import code_digest, network_digest
from interp_models.core.files import locked
from interp_models.evaluation.engine import Engine
from interp_models.evaluation.judgement import PICTURES, Judgement
from interp_models.explainers import GradCAM
from tests import processes
from tests.evaluation.test_judge import QUICK, network, pictures

ONE: dict[str, Any] = {"explainers": ["gradcam"], "metrics": ["dauc"], **QUICK}


def value(judgement: Judgement) -> list[float]:
    return [*judgement.per_image["value"], *judgement.per_image["confidence"]]


class Cooled(nn.Module):
    """A network with a temperature that is no buffer."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = network(), temperature

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) / self.temperature
        return y


class Hidden(nn.Module):
    """A network with a factor that is in no state_dict."""

    def __init__(self, factor: float, *, buffer: bool) -> None:
        super().__init__()
        self.net, self.options = network(), {"scale": factor}
        if buffer:
            self.options["scale"] = 1.0
        self.register_buffer("factor", torch.tensor(factor if buffer else 1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) * self.factor * self.options["scale"]
        return y


class Pair(nn.Module):
    """Two tensors of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y: Tensor = self.net(x)
        return y, -y


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"normalize": "imagenet"}, {"normalize": ([0.1] * 3, [0.9] * 3)}),
        ({"output": "softmax"}, {"output": "sigmoid"}),
        ({"model": Pair(), "output": 0}, {"model": Pair(), "output": 1}),
        ({"model": Cooled(1.0)}, {"model": Cooled(0.1)}),
        ({"model": Hidden(1.0, buffer=True)}, {"model": Hidden(9.0, buffer=True)}),
        ({"model": Hidden(1.0, buffer=False)}, {"model": Hidden(9.0, buffer=False)}),
    ],
    ids=["normalize", "kind of output", "place of output", "attribute", "buffer", "dict"],
)
def test_what_the_weights_do_not_show_is_seen(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    def judged(options: dict[str, Any], folder: Path | None = None) -> list[float]:
        return value(judge(**{"model": network(), "images": pictures(), **ONE, **options}, folder=folder))

    assert judged(first, tmp_path) == judged(first) == judged(first, tmp_path)
    date = (tmp_path / "results.json").stat().st_mtime_ns
    assert judged(first, tmp_path) == judged(first)
    assert (tmp_path / "results.json").stat().st_mtime_ns == date  # found again
    assert judged(second) != judged(first)
    assert judged(second, tmp_path) == judged(second)


def test_names_of_classes_are_those_of_the_call(tmp_path: Path) -> None:
    for classes in (list("abcd"), list("efgh")):
        found = judge(network(), pictures(), classes=classes, folder=tmp_path, **ONE)
        assert found.classes == tuple(classes)


def test_a_plugins_code_is_part_of_the_key(tmp_path: Path) -> None:
    """A digest of its file; classes of this package have none, as their version is known."""
    files = [tmp_path / f"{name}.py" for name in ("one", "same", "other")]
    classes = []
    for path, number in zip(files, (1, 1, 2), strict=True):
        text = f"class A:\n    x = {number}\n"
        path.write_text(text)
        names: dict[str, Any] = {"__name__": path.stem}
        exec(compile(text, str(path), "exec"), names)
        sys.modules[path.stem] = type(sys)(path.stem)
        sys.modules[path.stem].__file__ = str(path)
        classes.append(names["A"])
    digests = [code_digest(cls) for cls in classes]
    for path in files:
        del sys.modules[path.stem]
    assert digests[0] == digests[1] != digests[2]
    assert all(digests)
    assert code_digest(GradCAM) == ""


def test_a_networks_digest_changes_with_its_attributes_alone() -> None:
    one, same, other = Cooled(1.0), Cooled(1.0), Cooled(2.0)
    assert network_digest(one) == network_digest(same.eval()) != network_digest(other)
    assert network_digest(one.bfloat16()) == network_digest(same.bfloat16())


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    judge(network(), pictures(), folder=tmp_path / "new" / "folder", **ONE)
    mine = tmp_path / "mine"
    (mine / "maps").mkdir(parents=True)
    (mine / "maps/mine.npy").write_text("mine")
    (mine / "results.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"folder=.*mine holds files that are not those of an evaluation"):
        judge(network(), pictures(), folder=mine, **ONE)
    assert (mine / "maps/mine.npy").read_text() == "mine"
    assert (mine / "results.json").read_text() == '{"mine": 1}'
    with pytest.raises(InputError, match=r"folder=.*results.json.* cannot be"):
        judge(network(), pictures(), folder=mine / "results.json", **ONE)
    with pytest.raises(InputError, match=r"folder=.*below cannot be"):
        judge(network(), pictures(), folder=mine / "results.json/below", **ONE)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    judge(network(), pictures(), folder="~/x", **ONE)
    assert (tmp_path / "x/results.json").is_file()


def test_results_never_stand_beside_pictures_of_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is stopped right before or after its last file."""
    first = judge(network(), pictures(), folder=tmp_path, **ONE)
    others = pictures(4).flip(3)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "tables", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judge(network(), others, folder=tmp_path, **ONE)
    again = judge(network(), pictures(), folder=tmp_path, **ONE)
    assert again.pictures is not None
    assert first.pictures is not None
    assert again.pictures.keys() == first.pictures.keys()
    assert all((again.pictures[key] == first.pictures[key]).all() for key in first.pictures)
    found = judge(network(), others, folder=tmp_path, **ONE)
    assert found.pictures is not None
    assert len(found.pictures) == found.summary_of_model.n_judged == 4


@pytest.mark.parametrize("damage", [b"PK\x03\x04", b""])
def test_damaged_pictures_are_made_anew(tmp_path: Path, damage: bytes) -> None:
    expected = judge(network(), pictures(), folder=tmp_path, **ONE)
    (tmp_path / PICTURES).write_bytes(damage)
    found = judge(network(), pictures(), folder=tmp_path, **ONE)
    assert value(found) == value(expected)
    assert found.pictures is not None
    assert len(found.pictures) == 7


def test_an_explainer_must_be_of_the_judged_model() -> None:
    """A model that is wrapped to normalise images is another one: its explainers see other images."""
    model = network()
    judge(model, pictures(), [GradCAM(model)], ["dauc"], **QUICK)
    wrapped = Classifier(model, mean=[0.5] * 3, std=[0.5] * 3)
    judge(wrapped, pictures(), [GradCAM(wrapped)], ["dauc"], **QUICK)
    with pytest.raises(InputError, match="GradCAM was built for another model"):
        judge(model, pictures(), [GradCAM(model)], ["dauc"], normalize="imagenet", **QUICK)
    with pytest.raises(InputError, match="GradCAM was built for another model"):
        judge(model, pictures(), [GradCAM(network())], ["dauc"], **QUICK)


def test_an_explainer_keeps_its_preparation() -> None:
    model = network()
    explainer = GradCAM(model)
    judge(model, pictures(), [explainer], ["dauc"], preparation="none", **QUICK)
    assert explainer.preparation == "exact"


def test_labels_of_explainers_are_different() -> None:
    model = network()
    explainers = [GradCAM(model), {"name": "random", "label": "other"}]
    assert set(judge(model, pictures(), explainers, ["dauc"], **QUICK).maps) == {"GradCAM", "other"}
    with pytest.raises(InputError, match="two explainers have one label: GradCAM, GradCAM"):
        judge(model, pictures(), [GradCAM(model), {"name": "random", "label": "GradCAM"}], ["dauc"], **QUICK)


def test_a_label_out_of_range_is_refused_before_work() -> None:
    right = [0, 1, 2, 3, 3, 3, 3]
    judge(network(), pictures(), labels=right, target="label", **ONE)
    for wrong in (4, -1):
        with pytest.raises(InputError, match=f"target 'label': label {wrong} is out of range; the model has classes 0"):
            judge(network(), pictures(), labels=[*right[:-1], wrong], target="label", batch_size=2, **ONE)


def test_options_are_not_given_twice() -> None:
    wrapped = Classifier(network(), mean=[0.5] * 3, std=[0.5] * 3)
    judge(wrapped, pictures(), **ONE)
    for options in ({"normalize": "imagenet"}, {"output": "softmax"}):
        with pytest.raises(InputError, match="normalize and output are those of the Classifier"):
            judge(wrapped, pictures(), **ONE, **options)


def test_modes_of_every_module_stay() -> None:
    model = network().train()
    model[1].eval()
    judge(model, pictures(), normalize="imagenet", **ONE)
    assert [part.training for part in (model, model[0], model[1])] == [True, True, False]


def test_a_wrapper_hides_no_statistics() -> None:
    """Those of timm's models, and that torchvision's models have none."""
    import torchvision

    model = timm.create_model("test_resnet", num_classes=3).eval()
    expected = value(judge(model, pictures(3, 64), **ONE))
    assert value(judge(nn.DataParallel(model), pictures(3, 64), **ONE)) == expected
    assert value(judge(model, pictures(3, 64), normalize=None, **ONE)) != expected
    compiled = torch.compile(model, backend="eager")
    assert value(judge(compiled, pictures(3, 64), **ONE)) == expected
    resnet = nn.DataParallel(torchvision.models.resnet18(weights=None, num_classes=3))
    with pytest.raises(InputError, match="ResNet of torchvision does not say how its images are normalised"):
        judge(resnet, pictures(2, 64), **ONE)


def test_images_that_the_model_cannot_take_are_refused() -> None:
    judge(network(), pictures(), **ONE)
    with pytest.raises(
        InputError, match=r"Sequential cannot take images \(1, 1, 32, 32\) of float32 \(.*chan"
    ) as error:
        judge(network(), pictures()[:, :1], **ONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"explainers": "gradcam"}, "explainers must be a list; got 'gradcam'"),
        ({"metrics": None}, "metrics must be a list; got None"),
        ({"model": "resnet18"}, "model must be a torch.nn.Module; got str"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(**{"model": network(), "images": pictures(), **ONE, **arguments})


def test_sigmoid_is_looked_for_in_eval_mode() -> None:
    """The statistics of batch norms stay, and what a network does in eval mode counts."""

    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y if self.training else y.sigmoid()

    model = Deployed().train()
    classifier = Classifier(model, output="sigmoid")
    before = int(model.net[1].num_batches_tracked)
    classifier(pictures())
    assert int(model.net[1].num_batches_tracked) == before + 1
    model.eval()
    found: Any = classifier(pictures())
    torch.testing.assert_close(found.logits, model.net(pictures()), rtol=1e-4, atol=1e-5)


class Broken(nn.Module):
    """Logits are NaN for white images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x).log_softmax(dim=1)
        return torch.where(x.amin(dim=(1, 2, 3))[:, None] < 1, y, torch.nan)


def test_logits_that_are_nan_name_the_image() -> None:
    images = pictures()
    judge(Broken(), images, **ONE)
    images[5] = 1
    with pytest.raises(InputError, match="the model returns NaN or infinite values for image 5"):
        judge(Broken(), images, **ONE)


def test_no_prepared_copy_is_kept() -> None:
    before = len(prepared._prepared)
    judge(network(), pictures(), normalize="imagenet", **ONE)
    images = pictures()
    images[5] = 1
    with pytest.raises(InputError, match="the model returns NaN"):
        judge(Broken(), images, **ONE)
    assert len(prepared._prepared) == before


def _refused_on_a_rank(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(InputError, match="the processes have models with different weights"):
        judge(other, pictures(4, 8), ["random"], ["dauc"], grid=(4, 4), **QUICK)
    with pytest.raises(InputError, match="in use"):
        judge(network(), pictures(), folder=folder / "used", **ONE)
    images = pictures(4)
    images[3] = 1
    with pytest.raises(InputError, match="the model returns NaN or infinite values for image 3"):
        judge(Broken(), images, batch_size=1, **ONE)
    found = judge(nn.parallel.DistributedDataParallel(network()), pictures(4), normalize="imagenet", **ONE)
    assert len(found.per_image) == 4
    assert dist.get_world_size() == 2


@pytest.mark.slow
def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    with locked(tmp_path, "a test"):
        (tmp_path / "used").mkdir()
        with locked(tmp_path / "used", "an evaluation"):
            processes.run_ranks(_refused_on_a_rank, tmp_path)


class Labelled(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images with labels that are given."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels, self.images = [torch.as_tensor(label) for label in labels], pictures(len(labels), 8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


SHARED_LABELS: list[tuple[str | None, list[Any]]] = [
    (None, [0, 1, 2, 3, 0, 1, 2, 3]),
    ("label 7 is out of range", [0, 7, 2, 3, 0, 1, 2, 3]),
    ("target 7 is out of range", [0, 1, 2, 3, 0, 7, 2, 3]),
    ("labels, and the images have none", [0, -1, 2, -1, 0, 1, 2, 3]),
    (None, [[True, False, False, True], [True] * 4] * 4),
    ("must be bool", [[True] * 4, [1.0] * 4] * 4),
    ("must be bool", [[True] * 4] * 5 + [[1.0] * 4, [True] * 4, [1.0] * 4]),
    ("the processes have images or labels of different shapes", [0, [True] * 4] * 4),
    ("several labels of each image must be", [[True] * 4, [True] * 5] * 4),
]
"""What is refused, and labels of which each of two ranks has every other one."""


def _refused_by_the_labels_of_a_rank(rank: int, folder: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    for x in net.parameters():
        nn.init.constant_(x, 0.01)
    for number, (refusal, labels) in enumerate(SHARED_LABELS):
        images = Labelled(labels)
        for where in (None, folder / f"results{number}"):
            loader = DataLoader(images, batch_size=2, sampler=DistributedSampler(images, shuffle=False))
            plan: Any = {"target": "label", "grid": (4, 4), "folder": where, **QUICK}
            expected = nullcontext() if refusal is None else pytest.raises(InputError, match=refusal)
            with expected:
                assert set(judge(net, loader, ["random"], ["dauc"], **plan).per_image["index"]) == set(range(8))
            dist.barrier()


@pytest.mark.slow
def test_all_ranks_refuse_the_labels_of_one(tmp_path: Path) -> None:
    processes.run_ranks(_refused_by_the_labels_of_a_rank, tmp_path)


def _as_it_is(output: Any) -> Any:
    return output


def test_reshape_may_be_a_function(tmp_path: Path) -> None:
    """In memory it is named; in a folder, its results could not be told from those of other code."""
    plan = [{"name": "gradcam", "layer": "3", "reshape": _as_it_is}]
    found = judge(network(), pictures(2), plan, ["ad"], progress=False)
    plain = judge(network(), pictures(2), [{"name": "gradcam", "layer": "3"}], ["ad"], progress=False)
    np.testing.assert_array_equal(found.maps["gradcam"], plain.maps["gradcam"])
    assert found.tables.rows[0]["options"]["reshape"] == f"{__name__}._as_it_is"
    with pytest.raises(InputError, match="explainer gradcam: with folder=, reshape must be text or numbers"):
        judge(network(), pictures(2), plan, ["ad"], progress=False, folder=tmp_path / "out")


class Two(nn.Module):
    """The sum of two networks, so that no layer holds all evidence."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = network(), network()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x.flip(3))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_without_a_layer_is_judged(wrapped: bool) -> None:
    net = Classifier(Two(), mean=(0.5,) * 3, std=(0.5,) * 3) if wrapped else Two()
    expected = r"no layer of Two gives the grid of the maps: they are brought to 7 x 7 cells; grid=\[rows, columns\]"
    with pytest.warns(UserWarning, match=expected):
        found = judge(net, pictures(2), ["gradcam", "random"], ["dauc"], **QUICK)
    assert list(found.maps) == ["random"]
    assert "Two has no layer that all evidence passes" in found.tables.left_out["gradcam"]
    assert found.tables.rows[0]["grid"] == "7x7"
    given = judge(net, pictures(2), ["random"], ["dauc"], grid=[7, 7], **QUICK)
    assert value(given) == value(found)
