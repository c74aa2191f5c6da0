"""What a training does to the weights, and what it leaves in its folder."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from interp_models import EXPLAINERS, METRICS, MODELS, load, probabilities
from interp_models.config.loading import as_dict, check
from interp_models.core.errors import InputError
from interp_models.data.base import Sample, collate
from interp_models.metrics.case import Case
from interp_models.models.cnn import CNN
from interp_models.report import visual
from interp_models.runs.building import build_data, build_model
from interp_models.runs.config import TrainConfig
from interp_models.runs.loading import run_config
from interp_models.runs.resume import images_of
from interp_models.training.class_report import ClassReport
from interp_models.training.module import FORMAT_VERSION, InterpModule
from interp_models.training.recipe import Optimizer, Phase, Recipe, check_groups
from interp_models.training.schedule import PhaseSchedule
from tests.conftest import BCNN_LRS, QUICK_EVALUATION, TINY_CNN, Cub, Script, fit, tiny_config, write_config

ROOT = Path(__file__).parents[2]
ALL = ("backbone", "attention", "head")
State = dict[str, Tensor]
Inject = Callable[..., None]


class Spy(pl.Callback):
    """Copies the weights before a training and after each of its epochs."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.tested: State = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.states = [copy(module)]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.states.append(copy(module))

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.tested = copy(module)


def copy(module: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: State, after: State) -> dict[str, set[str]]:
    """By the first part of their names: the kinds of tensor that changed, `weight` or `statistic`."""
    changed: dict[str, set[str]] = {group: set() for group in ALL}
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            kind = "statistic" if name.split(".")[-1] in STATISTICS else "weight"
            changed[name.split(".")[0]].add(kind)
    return changed


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def checkpoint(run: Path, name: str) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True))


# Phases


def test_groups_that_are_not_named_are_frozen(tiny_cub: Cub, tmp_path: Path, inject: Inject) -> None:
    """Also right after they were trained: neither momentum nor weight decay nor old gradients move them."""
    inject(spy := Spy())
    phases = [
        {"epochs": 1, "lrs": {"head": 0.01}, "eval_modules": ["backbone"]},
        {"epochs": 1, "lrs": dict.fromkeys(ALL, 0.01)},
        {"epochs": 1, "lrs": {"attention": 0.01}, "eval_modules": ["backbone"]},
        {"epochs": 1, "lrs": {"backbone": 0.01}, "eval_modules": ["backbone"]},
        {"epochs": 1, "lrs": {"head": 0.01, "attention": 0.01}},
    ]
    optimizer = {"name": "adamw", "weight_decay": 0.5}
    fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=phases, optimizer=optimizer))
    steps = [moved(before, after) for before, after in zip(spy.states, spy.states[1:], strict=False)]
    nothing: set[str] = set()
    assert steps == [
        {"backbone": nothing, "attention": nothing, "head": {"weight"}},
        {"backbone": {"weight", "statistic"}, "attention": {"weight"}, "head": {"weight"}},
        {"backbone": nothing, "attention": {"weight"}, "head": nothing},
        {"backbone": {"weight"}, "attention": nothing, "head": nothing},
        {"backbone": {"statistic"}, "attention": {"weight"}, "head": {"weight"}},
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_step_is_that_of_plain_torch(tiny_cub: Cub, tmp_path: Path, inject: Inject, weight_decay: float) -> None:
    inject(spy := Spy())
    config = tiny_config(
        tiny_cub.root,
        out=str(tmp_path / "run"),
        phases=[{"epochs": 1, "lrs": {"head": 0.5, "attention": 0.1}, "eval_modules": ["backbone"]}],
        optimizer={"name": "sgd", "momentum": 0.9, "weight_decay": weight_decay},
    )
    config["data"] |= {"batch_size": 9, "augment": False}
    fit(config)
    node = as_dict(check(TrainConfig, config))
    model = build_model(node, 3).eval()
    model.load_state_dict(spy.states[0])
    dataset = build_data(node).dataset("train")
    batch = collate([dataset[0, position] for position in range(9)])
    loss = F.cross_entropy(model(batch.image).logits, batch.label)
    loss.backward()
    for name, parameter in model.named_parameters():
        lr = {"backbone": 0.0, "attention": 0.1, "head": 0.5}[name.split(".")[0]]
        expected = parameter - lr * (parameter.grad + weight_decay * parameter)
        torch.testing.assert_close(spy.states[1][name], expected, rtol=1e-5, atol=1e-7)
    table = pd.read_csv(tmp_path / "run/metrics.csv")
    assert table["train/loss"].dropna().tolist() == pytest.approx([loss.item()], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "cls", "option"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7}),
    ],
)
def test_optimizer_is_the_one_of_the_recipe(name: Any, cls: type, option: dict[str, float]) -> None:
    model = CNN(3, backbone="test_efficientnet", weights=None)
    model.recipe = Recipe([Phase(lrs={"head": 1})], Optimizer(name, weight_decay=0.3, momentum=0.7))
    optimizer = model.configure_optimizers()
    assert type(optimizer) is cls
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["backbone", "head"]
    assert [id(p) for p in groups["head"]["params"]] == [id(p) for p in model.head.parameters()]
    assert [id(p) for p in groups["backbone"]["params"]] == [id(p) for p in model.backbone.parameters()]
    for group in groups.values():
        assert group["weight_decay"] == 0.3
        assert {key: group[key] for key in option} == option
        assert group["lr"] == 0.0  # until a phase says otherwise


def test_groups_are_disjoint_and_complete() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = list(module[0].parameters()), list(module[1].parameters())
    check_groups(module, {"a": first, "b": second})
    with pytest.raises(InputError, match=r"^parameter '1\.bias' is in no parameter group$"):
        check_groups(module, {"a": first, "b": second[:1]})
    with pytest.raises(InputError, match=r"^parameter '0\.bias' is in groups 'a' and 'b'$"):
        check_groups(module, {"a": first, "b": [*second, first[1]]})
    with pytest.raises(InputError, match=r"^parameter '0\.weight' is in groups 'a' and 'a'$"):
        check_groups(module, {"a": [*first, first[0]], "b": second})


@pytest.mark.parametrize(
    ("strategy", "lrs", "refused"),
    [
        (DDPStrategy(), {"head": 1.0}, True),
        (DDPStrategy(find_unused_parameters=True), {"head": 1.0}, False),
        (DDPStrategy(), {"head": 1.0, "backbone": 1.0}, False),
        (object(), {"head": 1.0}, False),
    ],
)
def test_ddp_must_skip_frozen_groups(strategy: Any, lrs: dict[str, float], refused: bool) -> None:
    model = CNN(3, backbone="test_efficientnet", weights=None)
    model.recipe = Recipe([Phase(lrs=lrs)])
    trainer: Any = SimpleNamespace(strategy=strategy)
    if refused:
        with pytest.raises(InputError, match=r"need trainer\.strategy=ddp_find_unused_parameters_true"):
            PhaseSchedule().on_fit_start(trainer, model)
    else:
        PhaseSchedule().on_fit_start(trainer, model)


# Checkpoints


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_checkpoints_hold_plain_containers(bcnn_run: Path) -> None:
    data = build_data(run_config(bcnn_run))
    for name in ("best", "last"):
        content = checkpoint(bcnn_run, name)  # weights_only=True refuses anything else
        row = content["interp_models"].pop("metrics")
        logged = pd.read_csv(bcnn_run / "metrics.csv").dropna(subset=["train/loss"]).set_index("epoch")
        assert logged.loc[row.pop("epoch")].dropna().to_dict() == {**row, "phase": "train"}
        assert content["interp_models"] == {
            "format_version": FORMAT_VERSION,
            "num_classes": 3,
            "classes": ["001.Kind_1", "002.Kind_2", "003.Kind_3"],
            "images": {
                "train": [9, data.fingerprint("train"), images_of(data)["train"][2]],
                "val": [3, data.fingerprint("val"), images_of(data)["val"][2]],
            },
            "teacher": None,
            "config": run_config(bcnn_run),
            "phase": "train",
        }
        kinds = {type(leaf) for leaf in leaves(content)}
        assert kinds <= {str, int, float, bool, type(None), Tensor}
        assert "head.weight" in content["state_dict"]
    assert {path.name for path in (bcnn_run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_load_gives_the_trained_model(tiny_cub: Cub, tmp_path: Path, inject: Inject) -> None:
    inject(spy := Spy())
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=[{"epochs": 4, "lrs": BCNN_LRS}]))
    bird = tiny_cub.birds[1]
    picture = Image.open(tiny_cub.root / "images" / bird.path)
    for ckpt, state in (("best", spy.states[3]), ("last", spy.states[4])):
        model, transform = load(run, ckpt)  # type: ignore[arg-type]
        assert not any(module.training for module in model.modules())
        assert same(copy(model), state)
        trained = build_model(run_config(run), 3).eval()
        trained.load_state_dict(state)
        sample = build_data(run_config(run)).dataset("test")[0, 0]
        assert sample.label == bird.label
        torch.testing.assert_close(transform(picture), sample.image, rtol=0, atol=0)
        torch.testing.assert_close(transform(TF.pil_to_tensor(picture)), sample.image, rtol=0, atol=0)
        with torch.no_grad():
            logits = model(transform(picture)[None]).logits
            torch.testing.assert_close(logits, trained(sample.image[None]).logits, rtol=0, atol=0)
    assert same(spy.tested, spy.states[3])  # the best one was tested


def scripted(monkeypatch: pytest.MonkeyPatch, right: list[int]) -> None:
    """Makes the first `right[epoch]` validation images right and the others wrong."""

    def validation_step(self: InterpModule, batch: Sample, batch_idx: int) -> Any:
        output = self(batch.image)
        wrong = (torch.arange(len(batch.label)) >= right[self.current_epoch]).long()
        metric: Any = self.accuracy["val_acc"]
        metric.update(F.one_hot((batch.label + wrong) % 3, 3).float(), batch.label)
        self.log("val/acc", metric, batch_size=len(batch.label))
        return output

    monkeypatch.setattr(CNN, "validation_step", validation_step)


def cnn_config(tiny_cub: Cub, run: Path, epochs: int, **changes: Any) -> dict[str, Any]:
    phases = [{"epochs": epochs, "lrs": {"head": 0.01}}]
    return tiny_config(tiny_cub.root, out=str(run), model=TINY_CNN, phases=phases, **changes)


def test_the_first_of_the_best_epochs_is_selected(
    tiny_cub: Cub, tmp_path: Path, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1, 2, 0, 2])
    inject(spy := Spy())
    run = fit(cnn_config(tiny_cub, tmp_path / "run", 4))
    assert [checkpoint(run, name)["epoch"] for name in ("best", "last")] == [1, 3]
    assert same(checkpoint(run, "best")["state_dict"], spy.states[2])
    assert same(checkpoint(run, "last")["state_dict"], spy.states[4])
    assert same(spy.tested, spy.states[2])
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["selection"]) == (1, "best validation epoch")
    table = pd.read_csv(run / "metrics.csv")
    assert table["val/acc"].dropna().tolist() == pytest.approx([1 / 3, 2 / 3, 0, 2 / 3])


def test_without_validation_the_last_epoch_is_taken(tiny_cub: Cub, tmp_path: Path, inject: Inject) -> None:
    inject(spy := Spy())
    config = cnn_config(tiny_cub, tmp_path / "run", 3)
    config["data"]["val_fraction"] = 0
    run = fit(config)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert same(copy(load(run)[0]), spy.states[3])
    assert same(spy.tested, spy.states[3])
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["epoch"], metrics["selection"]) == (2, "last epoch")
    assert "val/acc" not in metrics
    table = pd.read_csv(run / "metrics.csv")
    assert table["train/loss"].count() == 3
    assert not [column for column in table if column.startswith("val/")]


# Numbers


def plain_logits(run: Path, ckpt: str, root: Path, paths: list[str]) -> Tensor:
    """The logits of a run's model on images, by torch and torchvision alone, one image at a time."""
    model = build_model(run_config(run), 3).eval()
    model.load_state_dict(checkpoint(run, ckpt)["state_dict"])
    logits = []
    for path in paths:
        pixels = TF.pil_to_tensor(Image.open(root / "images" / path))
        small = TF.resize(pixels, [73, 73], antialias=True)[:, 4:68, 4:68] / 255
        with torch.no_grad():
            logits.append(model(small[None]).logits[0])
    return torch.stack(logits)


@pytest.mark.parametrize("name", ["bcnn_run", "cnn_run"])
def test_test_accuracy_is_that_of_a_plain_loop(name: str, request: pytest.FixtureRequest, tiny_cub: Cub) -> None:
    run = request.getfixturevalue(name)
    birds = [bird for bird in tiny_cub.birds if not bird.train]
    logits = plain_logits(run, "best", tiny_cub.root, [bird.path for bird in birds])
    right = logits.argmax(dim=1) == torch.tensor([bird.label for bird in birds])
    assert len(logits.argmax(dim=1).unique()) > 1  # or any accuracy would be a third
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/n"] == 12
    assert metrics["test/acc"] == pytest.approx(right.sum().item() / 12)
    table = pd.read_csv(run / "metrics.csv")
    assert not [column for column in table if column.startswith("test/")]  # no epoch is to be chosen by them


@pytest.mark.parametrize("name", ["cnn", "prototree"])
def test_images_without_a_label_are_left_out_of_the_measures(name: str) -> None:
    """The same for every batch size; without any label, nothing is measured."""
    torch.manual_seed(0)
    cls = MODELS.get(name)
    model = MODELS.build(name, dict(cls.small), num_classes=3).eval()
    images = torch.rand(6, 3, 64, 64)
    with torch.no_grad():
        predicted = model(images).logits.argmax(dim=1)

    def tested(labels: list[int | None], size: int) -> Mapping[str, float]:
        samples = [Sample(images[i], label, i) for i, label in enumerate(labels) if label is not None]
        loader = torch.utils.data.DataLoader(samples, batch_size=size, collate_fn=collate)
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        report = ClassReport(3, None)
        return pl.Trainer(accelerator="cpu", callbacks=[report], **options).test(model, loader, verbose=False)[0]

    right, wrong = predicted.tolist(), ((predicted + 1) % 3).tolist()
    labels = [right[0], -1, wrong[2], right[3], -1, right[5]]
    for size in (1, 2, 4, 6):
        found = tested(labels, size)
        assert (found["test/n"], found["test/acc"]) == (4, 0.75)
        assert set(found) == {"test/n", "test/acc", "test/acc_class_mean", *(f"test/{one}" for one in cls.statistics)}
        assert found == pytest.approx(tested([None if label < 0 else label for label in labels], 6))
    assert tested([-1] * 6, 4) == {}
    assert tested(right, 4)["test/acc"] == 1


def test_validation_numbers_are_those_of_a_plain_loop(bcnn_run: Path, tiny_cub: Cub) -> None:
    data = build_data(run_config(bcnn_run))
    birds = [bird for bird in tiny_cub.birds if bird.train]
    held_out = [birds[index] for index in data.val_indices]
    logits = plain_logits(bcnn_run, "last", tiny_cub.root, [bird.path for bird in held_out])
    labels = torch.tensor([bird.label for bird in held_out])
    last = pd.read_csv(bcnn_run / "metrics.csv").dropna(subset=["val/acc"]).iloc[-1]
    assert last["epoch"] == 3
    assert last["val/n"] == 3
    assert last["val/acc"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert last["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_metrics_csv_has_a_row_for_every_epoch(bcnn_run: Path) -> None:
    table = pd.read_csv(bcnn_run / "metrics.csv")
    columns = ["epoch", "step", "phase", "train/acc", "train/ce", "train/loss", "val/acc", "val/loss", "val/n"]
    columns += ["lr/backbone", "lr/attention", "lr/head"]
    assert sorted(table.columns) == sorted(columns)
    assert table["epoch"].tolist() == [0, 1, 2, 3]
    assert table["step"].tolist() == [1, 3, 5, 7]
    assert table.notna().all(axis=None)
    for group, lr in BCNN_LRS.items():
        assert table[f"lr/{group}"].tolist() == pytest.approx([lr] * 4)
    assert table["phase"].tolist() == ["train"] * 4
    assert table["train/ce"].equals(table["train/loss"])  # the B-CNN's loss has one term


def test_train_accuracy_is_that_of_the_steps(tiny_cub: Cub, tmp_path: Path, inject: Inject) -> None:
    """Of what the model said of the images it learnt from, in one epoch of two batches of four."""

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.right: list[float] = []
            self.hooked = False

        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Sample, batch_idx: int) -> None:
            def note(_: nn.Module, __: Any, output: Any) -> None:
                self.right += (output.logits.argmax(dim=1) == batch.label).tolist()

            self.handle = module.register_forward_hook(note)

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            self.handle.remove()

    inject(steps := Steps())
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=[{"epochs": 3, "lrs": BCNN_LRS}]))
    expected = np.reshape(steps.right, (3, 8)).mean(axis=1)
    assert len(set(expected)) > 1
    table = pd.read_csv(run / "metrics.csv")
    assert table["train/acc"].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("every", [1, 50])
def test_logging_every_so_many_steps_leaves_the_table_alone(tiny_cub: Cub, tmp_path: Path, every: int) -> None:
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": every}
    run = fit(cnn_config(tiny_cub, tmp_path / "run", 2, trainer=trainer))
    table = pd.read_csv(run / "metrics.csv")
    assert table["epoch"].tolist() == [0, 1]
    assert table.notna().all(axis=None)


def test_metrics_json_holds_the_selected_epochs_validation(
    tiny_cub: Cub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=[{"epochs": 4, "lrs": BCNN_LRS}]))
    metrics = json.loads((run / "metrics.json").read_text())
    table = pd.read_csv(run / "metrics.csv").set_index("epoch")
    assert metrics["val/acc"] == table.loc[metrics["epoch"], "val/acc"] == table["val/acc"].max()
    assert metrics["val/n"] == 3
    said = (
        f"validation accuracy {100 * metrics['val/acc']:.2f} %, test accuracy {100 * metrics['test/acc']:.2f} % on 12"
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"{said} images: {run}"


def test_the_phase_is_named(tiny_cub: Cub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log, also of a resumed run, in checkpoints and at the bar."""
    phases = [{"name": "warm", "epochs": 2, "lrs": {"head": 0.01}}]
    node = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=TINY_CNN, phases=phases)
    run = fit(node | {"trainer": {"accelerator": "cpu"}})
    assert "phase=warm" in capsys.readouterr().out
    fit(node | {"phases": [*phases, {"name": "joint", "epochs": 1, "lrs": {"head": 0.01}}]}, resume=run)
    assert pd.read_csv(run / "metrics.csv")["phase"].dropna().tolist() == ["warm", "warm", "joint"]
    assert checkpoint(run, "last")["interp_models"]["phase"] == "joint"


# Callbacks and loggers


class Sheets:
    """Stands in for `visual.contact_sheet` and notes what it is asked to draw."""

    def __init__(self, draw: Callable[..., None]) -> None:
        self.draw = draw
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.draw(*arguments)


def test_attention_is_drawn(tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual, "contact_sheet", sheets := Sheets(visual.contact_sheet))
    run = fit(
        tiny_config(
            tiny_cub.root,
            out=str(tmp_path / "run"),
            phases=[{"epochs": 4, "lrs": BCNN_LRS}],
            attention={"every_n_epochs": 2, "n_images": 2},
        )
    )
    assert sorted(path.name for path in (run / "attention").iterdir()) == ["epoch-001.png", "epoch-003.png"]
    assert len(sheets.calls) == 2
    rows, labels, columns, path = sheets.calls[-1]
    assert path.parent == run / "attention"
    path = run / "attention/epoch-003.png"
    assert columns == ["image", "mean", "three maps as RGB"]
    model, _ = load(run, "last")
    data = build_data(run_config(run))
    dataset = data.dataset("val")
    assert len(rows) == 2
    samples = [dataset[0, position] for position in (0, 2)]  # spread over the three
    with torch.no_grad():
        together = model(collate(samples).image)
    for number, (row, label, sample) in enumerate(zip(rows, labels, samples, strict=True)):
        pixels = visual.to_uint8(sample.image)
        assert np.array_equal(row[0], pixels)
        for drawn, expected in (
            (row[1], visual.overlay(pixels, together.maps[number].mean(dim=0))),
            (row[2], visual.rgb(together.maps[number], pixels)),
        ):
            assert np.abs(drawn.astype(int) - expected).max() <= 1  # grey levels
        names = data.classes[sample.label], data.classes[int(together.logits[number].argmax())]
        assert label == f"{names[0]}\n→ {names[1]}"
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    big = rows[0][0].repeat(2, 0).repeat(2, 1)[::16, ::16].astype(int)  # 64 pixels are drawn as 128
    offsets = (
        np.abs(sheet[y : y + 128 : 16, x : x + 128 : 16] - big).max()
        for y in range(sheet.shape[0] - 128)
        for x in range(sheet.shape[1] - 128)
    )
    assert min(offsets) == 0


def test_watching_changes_nothing(tiny_cub: Cub, tmp_path: Path, inject: Inject) -> None:
    """Pictures and metrics of maps during a training leave it as it would be without them."""
    config = tiny_config(tiny_cub.root, phases=[{"epochs": 2, "lrs": BCNN_LRS}])
    config["model"]["dropout"] = 0.3
    alone = fit(config | {"out": str(tmp_path / "alone")})
    watched = fit(
        config
        | {
            "out": str(tmp_path / "watched"),
            "attention": {"every_n_epochs": 1},
            "evaluation": {
                "every_n_epochs": 1,
                "max_steps": 3,
                "explainers": ["intrinsic", "gradcam", {"name": "rise", "masks": 8}],
                "metrics": ["ad", "dauc", "ic"],
                "n_images": 2,
            },
        }
    )
    for name in ("best", "last"):
        states = [checkpoint(run, name)["state_dict"] for run in (alone, watched)]
        assert same(*states)
    table, more = (pd.read_csv(run / "metrics.csv") for run in (alone, watched))
    pd.testing.assert_frame_equal(more[table.columns], table)
    judged = [f"val/{key}/{name}" for key in ("ad", "dauc", "ic") for name in ("intrinsic", "gradcam", "rise")]
    assert sorted(set(more.columns) - set(table.columns)) == sorted(judged)
    assert all(more[column].count() == 2 for column in judged)


def test_maps_are_judged_on_validation_images(tiny_cub: Cub, tmp_path: Path) -> None:
    evaluation = {"every_n_epochs": 2, "max_steps": 4, "explainers": ["gradcam"], "metrics": ["add", "dauc"]}
    phases = [{"epochs": 2, "lrs": BCNN_LRS}]
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=phases, evaluation=evaluation))
    model, _ = load(run, "last")
    dataset = build_data(run_config(run)).dataset("val")
    images = collate([dataset[0, position] for position in range(3)]).image
    with torch.no_grad():
        target = model(images).logits.argmax(dim=1)
    maps = EXPLAINERS.build("gradcam", model=model).attribute(images, target)
    table = pd.read_csv(run / "metrics.csv")
    for key, name in (("add", "masked_confidence"), ("dauc", "deletion_insertion")):
        metric = METRICS.get(name)(grid=(4, 4), max_steps=4)
        metric.update(Case(images, maps, target, probabilities(model)))
        judged = table.dropna(subset=[f"val/{key}/gradcam"])
        assert judged["epoch"].tolist() == [1]
        assert judged[f"val/{key}/gradcam"].tolist() == pytest.approx([metric.compute()[key].item()], rel=1e-4)


def test_tensorboard(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", cnn_config(tiny_cub, tmp_path / "run", 1))
    outcome = script("train", config, "logger.tensorboard=true")
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        assert outcome.code == 0
        events = b"".join(p.read_bytes() for p in (tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
        assert b"train/loss" in events
        assert b"hp_metric" not in events
    else:
        assert outcome == (
            2,
            "",
            "error: logger.tensorboard=true needs the extra: pip install 'interp_models[tensorboard]'\n",
        )
        assert not (tmp_path / "run").exists()


def test_wandb_writes_into_the_run_folder(
    script: Script, tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of W&B for each training and each evaluation, also where one process makes several."""
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shown = {"every_n_epochs": 1, "n_images": 1}
        config = cnn_config(tiny_cub, folder, 1, logger={"wandb": "offline"}, attention=shown)
        assert script("train", write_config(tmp_path / "c.yaml", config)).code == 0
    options = ["logger.wandb=offline" if "wandb" in option else option for option in QUICK_EVALUATION]
    options += [f"out={tmp_path}/both", f"config={ROOT}/configs/eval/faithfulness.yaml"]
    assert script("evaluate", *folders, *options).code == 0
    assert wandb.run is None
    identities = []
    for folder in folders:
        names = sorted(path.name.split("-")[-1] for path in (folder / "wandb").glob("offline-run-*"))
        expected = [(folder / f".wandb-{job}").read_text() for job in ("train", "evaluate")]
        assert names == sorted(expected)
        for name in names:
            (written,) = (folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
            assert written.stat().st_size > 0
        (trained,) = (folder / "wandb").glob(f"offline-run-*-{expected[0]}/run-{expected[0]}.wandb")
        assert b"train/loss" in trained.read_bytes()
        caption = re.compile(r"\.jpg: [\w.]+ → [\w.]+, \d+ %".encode())
        assert caption.search(trained.read_bytes())
        assert len(list(trained.parent.glob("files/media/images/attention_*.png"))) == 1
        identities += names
    assert len(set(identities)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "c.yaml", "one", "two"]
