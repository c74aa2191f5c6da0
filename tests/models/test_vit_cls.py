"""A vision transformer as timm has it, with its attention, and learning rates that fall from block to block."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch

from interp_models import MODELS
from interp_models.core.errors import InputError
from interp_models.models.protopnet import ProtoPNet
from interp_models.models.vit_cls import ViTCLS
from interp_models.nn.attention import attentions, weights
from interp_models.training.recipe import Optimizer, Phase, Recipe
from tests.conftest import TINY, TINY_VIT, Cub, Script, fit, tiny_config, write_config
from tests.mutation import mutated


def make(cls=ViTCLS, backbone=TINY_VIT, **options):
    torch.manual_seed(0)
    return cls(num_classes=4, backbone=backbone, weights=None, **options)


@pytest.mark.parametrize("backbone", [TINY_VIT, "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"])
def test_logits_are_those_of_the_transformer_and_its_classifier(backbone):
    """By timm's own forward, of images that timm's config normalises; the class token alone, and with other tokens."""
    model = make(backbone=backbone).eval()
    net = timm.create_model(backbone, num_classes=0, dynamic_img_size=True).eval()
    net.load_state_dict(model.backbone.state_dict())
    side = net.patch_embed.patch_size[0]
    x = torch.rand(2, 3, 4 * side, 6 * side)
    mean, std = (torch.tensor(net.default_cfg[key])[:, None, None] for key in ("mean", "std"))
    output = model(x)
    torch.testing.assert_close(output.logits, model.head(net((x - mean) / std)), rtol=1e-5, atol=1e-6)
    with weights(attentions(net)) as a:
        net((x - mean) / std)
    prefix = net.num_prefix_tokens
    assert output.maps.shape == (2, net.blocks[0].attn.num_heads, 4, 6)
    torch.testing.assert_close(output.maps.flatten(2), a[-1][:, :, 0, prefix:], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(output.maps.sum(dim=(2, 3)), 1 - a[-1][:, :, 0, :prefix].sum(dim=2))
    target = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(model.explain(output, target), sum(output.maps.unbind(dim=1)) / output.maps.shape[1])
    assert torch.equal(model.explain(output, target, "max"), output.maps.max(dim=1).values)


def check_hints(model, transformer, hints, prefix="backbone."):
    """Block b of L, counted from 0, has decay^(L - b), what is before them decay^(L + 1)."""
    count = len(transformer.blocks)
    assert hints.keys() >= set(transformer.parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            continue
        if block := re.match(rf"{prefix}blocks\.(\d+)\.", name):
            expected = 0.5 ** (count - int(block[1]))
        else:  # the last norm goes with the last block, and so do frequencies of rotations
            expected = 0.5 if name.startswith((f"{prefix}norm", f"{prefix}rope")) else 0.5 ** (count + 1)
        decays = parameter.dim() > 1 and not name.endswith(("pos_embed", "cls_token", "rope.freqs"))
        assert hints[parameter] == (pytest.approx(expected), decays), name


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_learning_rates_fall_towards_the_images(backbone):
    model = make(backbone=backbone, layer_decay=0.5)
    hints = model.optimizer_hints()
    check_hints(model, model.backbone, hints)
    assert hints[model.head.bias] == (1.0, False)
    assert model.head.weight not in hints


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("layer_decay=decay", "layer_decay=decay**2"),
        ("no_weight_decay_list=transformer.no_weight_decay()", "no_weight_decay_list=()"),
        ('group["weight_decay"] > 0', "True"),
        ("min(scale / last, 1.0) * decay", "min(scale / last, 1.0)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    model = make(backbone="vit_tiny_patch16_224")
    module = mutated("interp_models.training.optimizers", right, wrong)
    with pytest.raises(AssertionError):
        check_hints(model, model.backbone, module.layer_decay_hints(model.backbone, 0.5))


def test_a_transformer_below_another_model_has_the_decay_of_the_optimizer() -> None:
    net = ProtoPNet(3, backbone=TINY_VIT, weights=None)
    net.recipe = Recipe([Phase(lrs={"backbone": 0.1, "add_on": 0.2})], Optimizer(layer_decay=0.5, weight_decay=0.3))
    net.check_recipe()
    hints = {
        parameter: (group["scale"], group["weight_decay"] > 0)
        for group in net.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    check_hints(net, net.backbone.trunk, hints, "backbone.trunk.")
    assert hints[net.prototypes] == hints[net.add_on[0].bias] == (1.0, True)
    net.recipe.optimizer.layer_decay = 1.0
    assert {group["scale"] for group in net.configure_optimizers().param_groups} == {1.0}


@pytest.mark.parametrize(
    ("model", "decay", "message"),
    [
        (
            lambda: ProtoPNet(3, backbone=TINY, weights=None),
            0.5,
            "ProtoPNet has no transformer of plain blocks",
        ),
        (lambda: make(layer_decay=0.5), 0.5, "ViTCLS has its own option, model.layer_decay"),
        (lambda: ProtoPNet(3, backbone=TINY_VIT, weights=None), 1.5, "must be above 0 and at most 1; got 1.5"),
    ],
)
def test_a_layer_decay_that_does_not_apply_is_refused(model: Any, decay: float, message: str) -> None:
    made = model()
    made.recipe = Recipe([Phase(lrs={"backbone": 0.1})])
    made.check_recipe()
    made.recipe = Recipe([Phase(lrs={"backbone": 0.1})], Optimizer(layer_decay=decay))
    with pytest.raises(InputError, match=message):
        made.check_recipe()


def test_steps_follow_the_learning_rates(tiny_cub: Cub, tmp_path: Path) -> None:
    """Step by step the schedule multiplies what it sets for a name by the scale of each of its groups."""
    model = {"name": "vit_cls", "backbone": TINY_VIT, "weights": None, "layer_decay": 0.5, "drop_path": 0.0}
    run = tmp_path / "run"
    phases = [{"epochs": 1, "lrs": {"backbone": 0.1, "head": 0.2}}]
    config = tiny_config(tiny_cub.root, out=str(run), model=model, phases=phases)
    config["optimizer"] = {"name": "sgd", "momentum": 0.0}
    fit(config)
    table = pd.read_csv(run / "metrics.csv")
    assert table["lr/backbone"].dropna().tolist() == [pytest.approx(0.1)]
    groups = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {(group["name"], group["scale"]) for group in groups} == {
        ("head", 1.0),
        *(("backbone", 0.5**k) for k in range(1, 8)),
    }
    peak = {"backbone": 0.1, "head": 0.2}
    assert all(group["lr"] == pytest.approx(peak[group["name"]] * group["scale"]) for group in groups)
    made = make(layer_decay=0.5)
    made.recipe = Recipe([Phase(lrs={"backbone": 0.1, "head": 0.2})], Optimizer(weight_decay=0.3))
    groups = made.configure_optimizers().param_groups
    scales = {group["scale"] for group in groups if group["name"] == "backbone"}
    depth = len(made.backbone.blocks)
    assert scales == {0.5**k for k in range(1, depth + 2)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert sum(len(group["params"]) for group in groups) == len(list(made.parameters()))


@pytest.mark.parametrize(("backbone", "grid"), [(TINY_VIT, (4, 6)), ("vit_tiny_r_s16_p8_224", (2, 3))])
def test_the_class_token_decides(backbone, grid):
    """Whatever the patches' tokens are after the last block; of a network before the patches, too."""
    model = make(backbone=backbone).eval()
    x = torch.rand(2, 3, 64, 96)
    expected = model(x)
    assert expected.maps.shape[2:] == grid
    model.backbone.norm.register_forward_hook(
        lambda _, args, tokens: torch.cat([tokens[:, :1], torch.randn_like(tokens[:, 1:])], dim=1)
    )
    torch.testing.assert_close(model(x).logits, expected.logits)


def test_drop_path_acts_in_training_alone():
    model = make(drop_path=0.5)
    x = torch.rand(8, 3, 64, 64)
    assert not torch.equal(model.train()(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


def test_weights_of_another_size_of_images(tmp_path):
    """Position embeddings are interpolated at every pass: those of a file stay as they are."""
    torch.manual_seed(1)
    net = timm.create_model(TINY_VIT, num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    model = MODELS.build("vit_cls", {"backbone": TINY_VIT, "weights": str(tmp_path / "w.pt")}, num_classes=4).eval()
    assert torch.equal(model.backbone.pos_embed, net.pos_embed)
    side = net.patch_embed.img_size[0]
    x = torch.rand(1, 3, side, side)
    mean, std = (torch.tensor(net.default_cfg[key])[:, None, None] for key in ("mean", "std"))
    token = net.forward_head(net.forward_features((x - mean) / std), pre_logits=True)
    torch.testing.assert_close(model(x).logits, model.head(token), rtol=1e-5, atol=1e-6)
    assert model(torch.rand(1, 3, 64, 32)).maps.shape[2:] == (4, 2)


BAD = {
    "it is not a vision transformer for images of any size": {"backbone": "resnet18"},
    "classifies by its tokens' 'avg' pool, not by the class token": {"backbone": "vit_small_patch16_dinov3"},
    "holds no vision transformer of timm with a class token": {"backbone": "vit_wee_patch16_reg1_gap_256"},
    "unknown timm model 'vit_smal_patch16_224'": {"backbone": "vit_smal_patch16_224"},
    "model.layer_decay must be above 0 and at most 1": {"layer_decay": 1.5},
    "model.drop_path must be in [0, 1)": {"drop_path": 1.0},
    "does not exist": {"weights": "nowhere.pt"},
}


@pytest.mark.parametrize("why", BAD)
def test_bad_options(why):
    with pytest.raises(InputError) as error:
        ViTCLS(4, **{"backbone": TINY_VIT, "weights": None} | BAD[why])
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_are_no_whole_patches(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    model = {"name": "vit_cls", "backbone": TINY_VIT, "weights": None}
    config = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=model)
    config |= {"phases": [{"epochs": 1, "lrs": {"head": 0.1}}]}
    config["data"]["image_size"] = 70
    outcome = script("train", write_config(tmp_path / "c.yaml", config))
    assert outcome.code == 2
    assert "images of 70 × 70 pixels are not a whole number of patches of 16 × 16" in outcome.err
    assert not (tmp_path / "run").exists()
