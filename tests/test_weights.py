"""Files of weights as others write them: containers, prefixes, leftovers; and what must not be loaded."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from interp_models import MODELS
from interp_models.core.errors import InputError
from interp_models.models.cnn import CNN
from interp_models.models.vit_cls import ViTCLS
from interp_models.nn.backbone import Backbone
from interp_models.nn.weights import find
from interp_models.runs.train import tell_head
from tests.conftest import TINY, TINY_VIT, Cub, Script, tiny_config, write_config

State = dict[str, Tensor]
NET = "test_resnet"


def state_of(name: str, seed: int = 5, **options: Any) -> State:
    torch.manual_seed(seed)
    state: State = timm.create_model(name, num_classes=7, **options).state_dict()
    return state


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def without(leaf: str, state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith(leaf)}


def load(path: Path, content: Any, name: str = NET) -> State:
    """The trunk's state after the file was loaded."""
    torch.save(content, path / "w.pth")
    if name == TINY_VIT:
        return ViTCLS(4, backbone=name, weights=str(path / "w.pth")).backbone.state_dict()
    return Backbone(name, weights=str(path / "w.pth")).trunk.state_dict()


def check(state: State, loaded: State, leaving: str = " ") -> None:
    """All of the trunk is the file's."""
    assert len(loaded) > 20
    for key, value in loaded.items():
        if not key.endswith(leaving):
            assert torch.equal(value, state[key]), key


HEAD = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_v": torch.zeros(2, 2)}
FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=1.0)},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": np.float64(0.5)},
    "net": lambda s: {"net": s, "acc": 91.0},
    "network": lambda s: {"network": under("module.", s)},
    "nested": lambda s: {"checkpoint": {"model": under("_orig_mod.module.", s)}},
    "module": lambda s: {"state_dict": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "lightning": lambda s: {"state_dict": {**under("model.", s), "loss.weight": torch.ones(3)}},
    "backbone": lambda s: under("module.backbone.", s),
    "encoder": lambda s: {"encoder": under("encoder.", s), "projector": {"0.weight": torch.ones(2, 2)}},
    "unknown prefix": lambda s: {"state_dict": {**under("feature_extractor.body.", s), "clf.weight": torch.ones(2)}},
    "profiled": lambda s: {**s, "layer1.total_ops": torch.zeros(1, dtype=torch.float64)},
    "arrays": lambda s: {key: value.numpy() for key, value in s.items()},
    "optimizer": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_containers_and_prefixes(tmp_path, form):
    state = state_of(NET)
    check(state, load(tmp_path, FORMS[form](state)))


def test_counters_and_indices_may_be_missing_and_half_precision_is_read(tmp_path):
    state = state_of(NET)
    check(state, load(tmp_path, without("num_batches_tracked", state)), leaving="num_batches_tracked")
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    check({key: value.to(state[key].dtype) for key, value in half.items()}, load(tmp_path, half))
    with pytest.raises(InputError, match=r"the first 'bn1\.running_var'"):  # that one counts
        load(tmp_path, without("bn1.running_var", state))


def test_the_teacher_is_taken_and_two_networks_of_equal_right_are_refused(tmp_path):
    a, b = state_of(TINY_VIT, 1), state_of(TINY_VIT, 2)
    dino = {"student": under("module.backbone.", a), "teacher": {**under("backbone.", b), **HEAD}}
    check(b, load(tmp_path, dino, TINY_VIT))
    check(b, load(tmp_path, {"state_dict": a, "state_dict_ema": b}, TINY_VIT))
    check(a, load(tmp_path, {"student": a, "teacher": {"weight": torch.ones(2)}}, TINY_VIT))
    moco = {"state_dict": {**under("module.encoder_q.", a), **under("module.encoder_k.", b)}}
    with pytest.raises(InputError, match=r"several networks that fit test_vit, 'state_dict.module.encoder_k.' and"):
        load(tmp_path, moco, TINY_VIT)
    check(a, load(tmp_path, {"model": a, "net": a}, TINY_VIT))  # the same twice


def test_position_embeddings_of_another_size(tmp_path):
    """As timm interpolates them."""
    state = state_of(TINY_VIT, img_size=320)
    assert state["pos_embed"].shape[1] == 401
    expected = timm.create_model(TINY_VIT, pretrained=True, num_classes=0, pretrained_cfg_overlay={"state_dict": state})
    check(expected.state_dict(), load(tmp_path, {"model": state}, TINY_VIT))
    wide = state_of(TINY_VIT)
    wide["patch_embed.proj.weight"] = torch.ones(64, 3, 14, 14)
    with pytest.raises(InputError, match=r"'patch_embed.proj.weight' \(64, 3, 14, 14\) instead of \(64, 3, 16, 16\)"):
        load(tmp_path, wide, TINY_VIT)


def test_files_of_an_architectures_authors(tmp_path):
    """ConvNeXt's names, by its authors, of timm's: by hand for the first block."""
    state = state_of("test_convnext")
    theirs = {}
    for key, value in state.items():
        name = key.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        name = name.replace(".blocks.", ".").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        if ".downsample." in name:
            name = f"downsample_layers.{name.split('.')[1]}.{name.split('.downsample.')[1]}"
        theirs[name] = value
    assert "stages.0.0.dwconv.weight" in theirs
    check(state, load(tmp_path, {"model": theirs}, "test_convnext"))


@pytest.mark.parametrize(("small", "large"), [("resnet18", "resnet34"), (TINY_VIT, "deeper")])
def test_a_larger_network_is_refused(tmp_path, small, large):
    """Its first blocks have the names and the shapes of the smaller one's."""
    if large == "deeper":
        state = state_of(small, depth=8)
        extra = "blocks.6.norm1.weight"
    else:
        state, extra = state_of(large), "layer1.2.conv1.weight"
    check(state_of(small), load(tmp_path, state_of(small), small))
    with pytest.raises(InputError, match=rf"does not fit {small}: it belongs to a larger network, with '{extra}'"):
        load(tmp_path, state, small)


def port(state: State) -> dict[str, Tensor]:
    """The same tensors under other names of layers."""
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    return {f"features.{layers.index(k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v for k, v in state.items()}


def test_a_port_is_read_in_order_only_if_nothing_speaks_against_it(tmp_path):
    state = state_of(NET)
    check(state, load(tmp_path, port(state)))
    trunk = port({key: value for key, value in state.items() if not key.startswith("fc.")})
    check(state, load(tmp_path, trunk))
    bare = {f"x{i}": value for i, value in enumerate(state.values())}  # neither weight nor bias
    by_name = dict(sorted(port(state).items()))  # as .safetensors are: 10 before 2
    names = list(trunk)
    renumbered = dict(zip(reversed(names), trunk.values(), strict=True))
    for content in (bare, by_name, renumbered, {**trunk, "conv1.weight": torch.ones(1)}):
        with pytest.raises(InputError, match="does not fit test_resnet"):
            load(tmp_path, content)


def test_a_port_of_a_transformer_is_read_by_both_models_that_have_it(tmp_path):
    state = state_of(TINY_VIT)
    torch.save(port(state), tmp_path / "w.pth")
    check(state, Backbone(TINY_VIT, weights=str(tmp_path / "w.pth")).trunk.state_dict())
    check(state, load(tmp_path, port(state), TINY_VIT))


class Attention(nn.Module):
    """Layers of one shape, that read the same tensor or one another."""

    default_cfg = {"architecture": "resnet18", "classifier": "fc", "input_size": (3, 4, 4)}  # noqa: RUF012

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.q, self.k, self.parallel = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), parallel

    def forward_features(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) if self.parallel else self.k(self.q(x))


def test_layers_that_could_be_exchanged_are_not_read_in_order():
    content = {f"a.{i}.{leaf}": torch.ones(shape) for i in (0, 1) for leaf, shape in SHAPES.items()}
    assert find(Attention(parallel=False), content, Path("f")).state.keys() == Attention(False).state_dict().keys()
    with pytest.raises(InputError, match="does not fit"):
        find(Attention(parallel=True), content, Path("f"))


SHAPES = {"weight": (3, 3, 1, 1), "bias": (3,)}


def bad(write: Callable[[Path], object], end: str = ".pth") -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        write(folder / f"w{end}")
        return folder / f"w{end}"

    return made


UNREADABLE = {
    "it is empty": bad(lambda p: p.write_bytes(b"")),
    "it is a web page: the download failed": bad(lambda p: p.write_text("<!DOCTYPE html><html>404</html>")),
    "it is a pointer of Git LFS": bad(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid x")),
    "it is a TorchScript archive": bad(lambda p: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), p)),
    "it holds Python objects beside tensors, such as torch.nn.modules.linear.Linear, and reading them may run code; if "
    "you trust it, save torch.load(FILE, weights_only=False)['state_dict']": bad(
        lambda p: torch.save({"state_dict": {}, "hyper_parameters": nn.Linear(1, 1)}, p)
    ),
    "(Error while deserializing header: header too large)": bad(lambda p: p.write_bytes(b"\x01" * 200), ".safetensors"),
    "w is a folder": bad(lambda p: p.mkdir(), ""),
    "must hold named tensors; it holds a list": bad(lambda p: torch.save([torch.ones(1)], p)),
    "does not fit test_resnet: it holds no named tensors": bad(lambda p: torch.save({"epoch": 1}, p)),
    "'conv1.0.weight' (16, 1, 3, 3) instead of (16, 3, 3, 3)": bad(lambda p: torch.save(state_of(NET, in_chans=1), p)),
    "'conv1.0.weight' (16, 3, 3, 3) instead of (16, 3, 3, 3), of torch.int8": bad(
        lambda p: torch.save({k: v.to(torch.int8) for k, v in state_of(NET).items()}, p)
    ),
}


@pytest.mark.parametrize("why", UNREADABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_cannot_be_read_end_in_one_line(tmp_path, why):
    path = UNREADABLE[why](tmp_path)
    with pytest.raises(InputError) as e:
        Backbone(NET, weights=str(path))
    assert why in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    state = state_of(NET)
    save_file(state, tmp_path / "w.safetensors")
    check(state, Backbone(NET, weights="~/w.safetensors").trunk.state_dict())


def ours(name: str, model: nn.Module, classes: list[str], backbone: str = NET) -> dict[str, Any]:
    """What a checkpoint of a run holds, as far as weights go."""
    config = {"model": {"name": name, "backbone": backbone}}
    return {"state_dict": model.state_dict(), "interp_models": {"config": config, "classes": classes}}


def test_a_checkpoint_of_a_run(tmp_path):
    torch.manual_seed(7)
    for name in ("cnn", "br_npa"):
        model = MODELS.build(name, {"backbone": NET, "weights": None}, num_classes=3)
        torch.save(ours(name, model, ["a", "b", "c"]), tmp_path / "best.ckpt")
        again = CNN(3, backbone=NET, weights=str(tmp_path / "best.ckpt"))
        check(model.backbone.trunk.state_dict(), again.backbone.trunk.state_dict())
        source = again.head_source
        if name == "cnn":
            assert source is not None
            assert source.classes == ["a", "b", "c"]
            assert torch.equal(again.head.weight, model.head.weight)
        else:
            assert source is None
        assert CNN(4, backbone=NET, weights=str(tmp_path / "best.ckpt")).head_source is None
    torch.save(ours("cnn", model, ["a", "b", "c"], "resnet18"), tmp_path / "best.ckpt")
    with pytest.raises(InputError, match="is a checkpoint of a model with backbone 'resnet18', not 'test_resnet'"):
        CNN(3, backbone=NET, weights=str(tmp_path / "best.ckpt"))


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "lightning", "module", "port"])
def test_the_head_of_a_file_with_as_many_classes(tmp_path, form):
    """Logits are then those of timm's whole model."""
    torch.manual_seed(5)
    whole = timm.create_model(NET, num_classes=7).eval()
    torch.save(port(whole.state_dict()) if form == "port" else FORMS[form](whole.state_dict()), tmp_path / "w.pth")
    model = CNN(7, backbone=NET, weights=str(tmp_path / "w.pth")).eval()
    assert model.head_source is not None
    x = torch.rand(2, 3, 96, 64)
    expected = whole((x - model.backbone.mean) / model.backbone.std)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    fewer = CNN(6, backbone=NET, weights=str(tmp_path / "w.pth"))
    torch.manual_seed(1)
    again = CNN(6, backbone=NET, weights=str(tmp_path / "w.pth"))
    assert fewer.head_source is None
    assert torch.equal(fewer.head.weight, again.head.weight)
    assert fewer.keep_head(list("abcdef")) == f"head starts at random: {tmp_path / 'w.pth'} has none that fits"
    assert CNN(6, backbone=NET, weights=None).keep_head(list("abcdef")) is None


def test_a_head_behind_another_layer_is_not_loaded(tmp_path):
    """Of mobilenetv3 an activation stands between pool and classifier; of ConvNeXt a norm; the shapes fit."""
    for name in ("mobilenetv3_small_050", "test_convnext"):
        state = state_of(name)
        torch.save(state, tmp_path / "w.pth")
        model = CNN(7, backbone=name, weights=str(tmp_path / "w.pth"))
        check(state, model.backbone.trunk.state_dict())
        assert any(value.shape == model.head.weight.shape for value in state.values())
        assert model.head_source is None


def test_a_head_of_other_classes_starts_at_random(tmp_path, capsys):
    """A checkpoint of a run says its classes; another file cannot, and a line says what is taken for granted."""
    model = MODELS.build("cnn", {"backbone": NET, "weights": None}, num_classes=3)
    file = tmp_path / "best.ckpt"
    torch.save(ours("cnn", model, ["a", "b", "c"]), file)
    for classes, same in ((["a", "b", "c"], True), (["a", "c", "b"], False)):
        again = CNN(3, backbone=NET, weights=str(file))
        tell_head(again, SimpleNamespace(classes=classes))
        assert torch.equal(again.head.weight, model.head.weight) == same
        said = f"head from {file}, with the same classes"
        other = f"head not taken from {file}: it has other classes, 'b' in place of 'c'"
        assert capsys.readouterr().err == (said if same else other) + "\n"
    whole = state_of(NET)
    torch.save(whole, tmp_path / "w.pth")
    foreign = CNN(7, backbone=NET, weights=str(tmp_path / "w.pth"))
    tell_head(foreign, SimpleNamespace(classes=list("abcdefg")))
    assert torch.equal(foreign.head.weight, whole["fc.weight"])
    assert "its classes are assumed to be in the order of the data's" in capsys.readouterr().err
    tell_head(model, SimpleNamespace(classes=["x", "y", "z"]))
    assert capsys.readouterr().err == ""


def test_training_goes_on_from_a_run(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    """Its best checkpoint as `weights`: with a learning rate of 0, trunk and head stay those of the file."""
    model = {"name": "cnn", "backbone": TINY, "weights": None}
    config = tiny_config(tiny_cub.root, out=str(tmp_path / "a"), model=model)
    config |= {"phases": [{"epochs": 1, "lrs": {"head": 0.1}, "eval_modules": ["backbone"]}]}
    assert script("train", write_config(tmp_path / "a.yaml", config)).code == 0
    best = next((tmp_path / "a/checkpoints").glob("best.ckpt"))
    config["model"] = {**model, "weights": str(best)}
    config |= {
        "out": str(tmp_path / "b"),
        "phases": [{"epochs": 1, "lrs": {"head": 0.0}, "eval_modules": ["backbone"]}],
    }
    outcome = script("train", write_config(tmp_path / "b.yaml", config))
    assert outcome.code == 0, outcome.err
    assert f"head from {best}, with the same classes" in outcome.err
    before, after = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in "ab"
    )
    first = torch.load(best, weights_only=True)["state_dict"]
    assert before.keys() == after.keys()
    for key in (key for key in first if key.startswith(("backbone.", "head."))):
        assert torch.equal(first[key], after[key]), key


@pytest.mark.parametrize("what", ["nan", "sparse"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, what: str) -> None:
    state = timm.create_model(TINY).state_dict()
    torch.save(state, tmp_path / "w.pth")
    Backbone(TINY, weights=str(tmp_path / "w.pth"))
    key = next(key for key, value in state.items() if value.dim() == 4)
    state[key] = state[key] * torch.nan if what == "nan" else state[key].to_sparse()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="NaN or infinite" if what == "nan" else "sparse"):
        Backbone(TINY, weights=str(tmp_path / "w.pth"))
