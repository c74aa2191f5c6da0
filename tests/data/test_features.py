"""A training on cached features is the training on images, and features are computed once."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from interp_models import load
from interp_models.core.errors import InputError
from interp_models.data import features
from interp_models.data.features import cache_features
from interp_models.nn.backbone import Backbone
from interp_models.runs.building import build_data, build_model
from interp_models.runs.loading import run_config
from interp_models.training.feature_cache import FeatureCache
from interp_models.training.schedule import PhaseSchedule
from tests.conftest import TINY, Cub, Script, fit, tiny_config, tiny_options, write_config


def config_of(root: Path, out: Path, cache: Path | None, **data: Any) -> dict[str, Any]:
    """A DP-Net with all its constraints on a frozen backbone."""
    model = {"name": "dpnet", **tiny_options("dpnet"), "parts_per_class": 2, "windows": [1, 2]}
    model |= {"complementary": 1.0, "covering": 0.1, "specific": 1.0}
    phase = {"epochs": 3, "lrs": {"parts": 0.05, "head": 0.05}, "eval_modules": ["backbone"]}
    config = tiny_config(root, out=str(out), model=model, phases=[phase], attention={"every_n_epochs": 1})
    config["data"] |= {"augment": False} | data
    return config | {"feature_cache": None if cache is None else str(cache)}


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images have gone through the trunk of a backbone, pass by pass."""
    seen: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] == 3:
            seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counted)
    return seen


def arrays(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.npy"))


def same_trainings(run: Path, other: Path, *, bits: bool) -> None:
    near = {"rtol": 0.0, "atol": 0.0} if bits else {"rtol": 1e-4, "atol": 1e-6}
    a, b = (torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (run, other))
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], **near)
    a, b = (pd.read_csv(r / "metrics.csv") for r in (run, other))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert (run / "metrics.json").read_text() == (other / "metrics.json").read_text()


def test_a_training_on_features_is_one_on_images(tiny_cub: Cub, tmp_path: Path, passed: list[int]) -> None:
    """Pictures and the test are of images; a second training computes no features, and is the same bit by bit."""
    on_images = fit(config_of(tiny_cub.root, tmp_path / "images", None))
    passed.clear()
    cache = tmp_path / "cache"
    on_features = fit(config_of(tiny_cub.root, tmp_path / "features", cache))
    assert len(arrays(cache)) == 1
    pictures = 3 * 3  # all of the validation, every epoch
    assert sum(passed) == 1 + 2 + 1 + 9 + 3 + pictures + 12  # the first four try the size of images and features
    same_trainings(on_features, on_images, bits=False)
    assert len(list((on_features / "attention").glob("*.png"))) == 3
    passed.clear()
    again = fit(config_of(tiny_cub.root, tmp_path / "again", cache))
    assert sum(passed) == 1 + 2 + pictures + 12
    same_trainings(again, on_features, bits=True)
    model, _ = load(on_features, "last")
    fresh = build_model(run_config(on_features), 3)
    assert isinstance(fresh.backbone, Backbone)
    torch.manual_seed(0)
    assert not torch.equal(model.head.weight, fresh.head.weight)  # type: ignore[union-attr,arg-type]


def test_k_epochs_on_k_augmented_copies_are_those_on_images(tiny_cub: Cub, tmp_path: Path) -> None:
    """Before a phase that trains the backbone on images. With one copy the second epoch sees the first one's images."""

    def config(name: str, copies: int) -> dict[str, Any]:
        node = config_of(tiny_cub.root, tmp_path / name, tmp_path / f"cache{copies}" if copies else None, augment=True)
        joint = {"epochs": 2, "lrs": {"backbone": 0.01, "parts": 0.05, "head": 0.05}}
        sgd = {"name": "sgd"}  # Adam would make steps of rounding errors, where the gradient is 0
        phases = [node["phases"][0] | {"epochs": 2}, joint]
        return node | {"feature_copies": copies, "phases": phases, "optimizer": sgd}

    on_images = fit(config("images", 0))
    on_features = fit(config("features", 2))
    same_trainings(on_features, on_images, bits=False)
    assert len(arrays(tmp_path / "cache2")) == 2 + 1  # two copies of the training images, and the validation's
    losses = pd.read_csv(on_features / "metrics.csv")["train/loss"]
    fewer = pd.read_csv(fit(config("fewer", 1)) / "metrics.csv")["train/loss"]
    assert fewer[0] == pytest.approx(losses[0], rel=1e-5)
    assert fewer[1] != pytest.approx(losses[1], rel=1e-4)
    assert len(arrays(tmp_path / "cache2")) == 3
    few = config("few", 2)
    few["feature_cache"], few["phases"][0]["epochs"] = str(tmp_path / "few_cache"), 1
    fit(few)
    assert len(arrays(tmp_path / "few_cache")) == 1 + 1  # a copy that no epoch reads is not computed
    shutil.rmtree(tmp_path / "cache2")
    more = config("features", 2)
    more["phases"][1]["epochs"] = 3
    fit(more, resume=on_features)
    assert not (tmp_path / "cache2").exists()  # behind the phase on features nothing is cached


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of square pictures."""
    draw = np.random.default_rng(0)
    for split, name, number in product(("train", "test"), "ab", range(4)):
        path = tmp_path / "pictures" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def keys_of(root: Path, folder: Path, copies: int, **data: Any) -> set[str]:
    """The names of the subfolders of the cached features."""
    options = {
        "dataset": {"name": "image_folder", "root": str(root)},
        "image_size": 64,
        "num_workers": 0,
        "val_fraction": 0.5,
    } | data
    cache_features(Backbone(TINY, weights=None), build_data({"seed": 0, "data": options}), folder, copies=copies)
    return {path.name for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("copies", [0, 2])
def test_features_of_other_options_of_the_transform_are_computed_anew(
    pictures: Path, tmp_path: Path, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the pictures that are looked at do not show it, as with square ones."""
    torch.manual_seed(0)
    state = Backbone(TINY, weights=None).state_dict()
    made = Backbone.__init__
    monkeypatch.setattr(Backbone, "__init__", lambda *a, **k: (made(*a, **k), a[0].load_state_dict(state))[0])
    folder, transform = tmp_path / "cache", {"name": "shorter_side", "crop_mode": "center"}
    first = keys_of(pictures, folder, copies, transforms=transform)
    assert keys_of(pictures, folder, copies, transforms=transform | {"crop_pct": 0.875}) == first  # the default
    second = keys_of(pictures, folder, copies, transforms=transform | {"crop_mode": "squash"})
    assert len(second) == 2 * len(first) == (4 if copies else 2)
    assert len(keys_of(pictures, folder, copies, transforms=transform | {"crop_pct": 1.0})) == 3 * len(first)


def test_validation_images_are_not_cropped_to_boxes_as_training_images_are(tiny_cub: Cub, tmp_path: Path) -> None:
    config = tiny_config(tiny_cub.root)
    config["data"] |= {"augment": False, "transforms": "corner_crop_warp_jitter", "val_fraction": 0.34}
    data, trunk = build_data(config), Backbone(TINY, weights=None).eval()
    found = cache_features(trunk, data, tmp_path)
    for split in ("train", "val"):
        cached, images = found[split], data.dataset(split, augment=False)
        with torch.no_grad():
            torch.testing.assert_close(cached[0, 0].image, trunk(images[0, 0].image[None])[0], rtol=1e-4, atol=1e-5)


def module_of(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_data(config), Backbone(**{"name": "test_efficientnet", "weights": None}).eval()


def test_features_are_those_of_the_images_in_their_order(
    tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int]
) -> None:
    """Whatever is not there is computed, whatever is there is not."""
    monkeypatch.setattr(features, "CHUNK", 4)
    data, backbone = module_of(config_of(tiny_cub.root, tmp_path / "run", None))
    splits = cache_features(backbone, data, tmp_path)
    cached = splits["train"]
    plain = data.dataset("train", augment=False)
    assert len(cached) == len(plain) == 9
    assert len(arrays(tmp_path)) == 3  # of 12 images: 9, and 3 for the validation
    assert len(splits["val"]) == 3
    assert sum(passed) == 1 + 12  # one to tell the size
    monkeypatch.setattr(features, "OPEN", 1)
    for position in (0, 3, 4, 8, 0):
        kept, sample = cached[7, position], plain[0, position]
        assert len(cached._arrays) == 1
        assert (kept.label, kept.index) == (sample.label, sample.index)
        with torch.no_grad():
            torch.testing.assert_close(kept.image, backbone(sample.image[None])[0], rtol=1e-4, atol=1e-5)
    arrays(tmp_path)[1].unlink()
    (arrays(tmp_path)[0].parent / ".00001.npy.partial").write_bytes(b"of an interrupted run")
    passed.clear()
    again = cache_features(backbone, data, tmp_path)["train"]
    assert sum(passed) == 1 + 4
    assert torch.equal(again[0, 5].image, cached[0, 5].image)
    passed.clear()
    cache_features(backbone, data, tmp_path)
    assert passed == []


def test_a_damaged_file_is_named(tiny_cub: Cub, tmp_path: Path) -> None:
    data, backbone = module_of(config_of(tiny_cub.root, tmp_path / "run", None))
    cached = cache_features(backbone, data, tmp_path)["train"]
    whole, others = arrays(tmp_path)[0].read_bytes(), []
    for array in (np.zeros((3, 5), np.float32), np.load(arrays(tmp_path)[0]).astype(np.float64)):
        np.save(tmp_path / "other.npy", array)
        others.append((tmp_path / "other.npy").read_bytes())
    for content in (b"", whole[:5], whole[: len(whole) // 2], *others):
        arrays(tmp_path)[0].write_bytes(content)
        with pytest.raises(InputError, match=r"feature_cache: .*00000\.npy cannot be read; delete it"):
            cached[0, 0]


def test_the_cache_depends_on_weights_transform_and_data(tiny_cub: Cub, tmp_path: Path) -> None:
    root = tmp_path / "cub"
    shutil.copytree(tiny_cub.root, root)

    def name(change: Any = lambda backbone: None, **options: Any) -> str:
        data, backbone = module_of(config_of(root, tmp_path, None, **options))
        change(backbone)
        return cache_features(backbone, data, tmp_path / "cache")["train"].files[0][0].parent.name

    def other_weight(backbone: Backbone) -> None:
        next(backbone.parameters()).data.mul_(1.001)

    def other_statistics(backbone: Backbone) -> None:
        next(b for n, b in backbone.named_buffers() if n.endswith("running_var"))[0] += 1e-3

    def other_layer(backbone: Backbone) -> None:
        next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)).stride = (1, 1)

    names = [name(), name(other_weight), name(other_statistics), name(other_layer)]
    names += [name(image_size=32), name(crop_to_box=True)]
    assert len(set(names)) == len(names)
    assert {name(batch_size=2), name(val_fraction=0.5), name(seed=1)} == {names[0]}
    data, _ = module_of(config_of(root, tmp_path, None))
    picture, other = (root / "images" / data.train_images.image_id(int(data.train_indices[i])) for i in (0, -1))
    shutil.copy(other, picture)
    assert name() != names[0]


def test_what_comes_after_the_training_has_images(tiny_cub: Cub, tmp_path: Path, passed: list[int]) -> None:
    """Another model with the same data module, and the model itself."""
    config = config_of(tiny_cub.root, tmp_path, None) | {"optimizer": {"name": "adam"}}
    data = build_data(config)
    for cached in (True, False):
        model = build_model(config, 3)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
            num_sanity_val_steps=0,
            callbacks=[*([FeatureCache(tmp_path / "cache")] if cached else []), PhaseSchedule()],
        )  # fmt: skip
        trainer.fit(model, data)
        assert data.cached_features == {}
        assert "forward" not in vars(model.backbone)  # but its class's
    assert sum(passed) == 1 + 12 + 8 + 3  # all once for the cache; by the second two steps of four and a validation


def test_a_loss_that_needs_other_images_is_refused(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    config = config_of(tiny_cub.root, tmp_path / "run", tmp_path / "cache")
    config["model"] = {"name": "wsdan", **tiny_options("wsdan")}
    config["phases"][0]["lrs"] = {"attention": 0.01, "head": 0.01}
    outcome = script("train", write_config(tmp_path / "c.yaml", config))
    assert outcome.code == 2
    assert "feature_cache: the model needs more than the batch's images, as for model.crop_drop" in outcome.err


REFUSED = {
    "needs data.augment=false, or feature_copies": {"data": {"augment": True}},
    "feature_copies needs data.augment=true": {"feature_copies": 2},
    "feature_copies must be 0 or more; got -1": {"feature_copies": -1},
    "data.transforms=corner_crop_warp_jitter crops training images only": {
        "data": {"transforms": "corner_crop_warp_jitter", "val_fraction": 0.2}
    },
    "phases[0].lrs must not train the backbone": {"lrs": {"backbone": 0.1, "parts": 0.1}},
    "phases[0].eval_modules must name backbone": {"eval_modules": []},
    "evaluation.every_n_epochs needs images": {"evaluation": {"every_n_epochs": 1, "explainers": ["intrinsic"]}},
    "ViTCLS has no backbone whose features could be cached": {"model": {"name": "vit_cls", **tiny_options("vit_cls")}},
    "distillation.teacher needs images": {"distillation": {"teacher": "bcnn_run"}},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_needs_images_is_refused(script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, why: str) -> None:
    config = config_of(tiny_cub.root, tmp_path / "run", tmp_path / "cache")
    for key, value in REFUSED[why].items():
        if key in ("lrs", "eval_modules"):
            config["phases"][0][key] = value
        elif key == "distillation":
            config[key] = {"teacher": str(bcnn_run)}
        elif key == "feature_copies":
            config[key] = value
        elif key == "model":
            config |= {"model": value, "phases": [{"epochs": 1, "lrs": {"head": 0.1}}]}
        else:
            config[key] = config.get(key, {}) | value
    outcome = script("train", write_config(tmp_path / "c.yaml", config))
    assert outcome.code == 2
    assert why in outcome.err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()  # so that it can be tried again


def test_a_folder_that_cannot_be_made_is_named(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = script(
        "train", write_config(tmp_path / "c.yaml", config_of(tiny_cub.root, tmp_path / "run", tmp_path / "file"))
    )
    assert outcome.code == 2
    assert f"feature_cache={tmp_path / 'file'} cannot be made" in outcome.err
