"""Which layer class activation maps read: known evidence in hand-made networks, and the same network in other forms."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from interp_models import EXPLAINERS, Classifier, InputError, NotApplicable
from interp_models.core.passes import counted_passes
from interp_models.explainers.layers import Layer, target_layer

METHODS = (
    "activation_map", "eigencam", "cam", "gradcam", "gradcam_pp", "hirescam", "xgradcam", "layercam", "guidancecam",
    "ablationcam", "liftcam", "scorecam", "opticam",
)  # fmt: skip
GENERAL = tuple(name for name in METHODS if name not in ("cam", "liftcam"))
"""Methods that need nothing of the layers after the one they read."""


def explained(name: str, model: nn.Module, images: Tensor, target: int = 1, **options: Any) -> Tensor:
    small = dict(EXPLAINERS.get(name).small)
    return EXPLAINERS.build(name, {**small, **options}, model=model).attribute(images, target)


def pictures(*size: int) -> Tensor:
    return torch.rand(2, *size, generator=torch.Generator().manual_seed(3))


def body(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.ReLU()
    )


class Pooled(nn.Module):
    """Features -> mean over cells -> linear."""

    def __init__(self, features: nn.Module, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features, self.fc = features, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


class Mirrored(nn.Module):
    """The mean of a network's logits for an image and its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x) + self.network(x.flip(3))) / 2


@pytest.mark.parametrize("name", METHODS)
def test_a_network_passed_twice_side_by_side_is_refused(name: str) -> None:
    network = Pooled(body()).eval()
    assert explained(name, network, pictures(3, 32, 32)).shape == (2, 8, 8)
    with pytest.raises(NotApplicable, match="runs 2 times"):
        explained(name, Mirrored(network).eval(), pictures(3, 32, 32))
    with pytest.raises(
        NotApplicable, match=r"layer network.features runs 2 times for one prediction, and the logits use more"
    ):
        explained(name, Mirrored(network).eval(), pictures(3, 32, 32), layer="network.features")


class Again(nn.Module):
    """A block that is applied twice, one application after the other; unrolled, two blocks of the same weights."""

    def __init__(self, unrolled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU())
        self.second = copy.deepcopy(self.block) if unrolled else None
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.block(x) if self.second is None else self.second(x)
        return self.fc(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("named", [False, True])
def test_the_last_of_several_uses_in_a_row_is_read(name: str, named: bool) -> None:
    images = pictures(3, 32, 32)
    expected = explained(name, Again(unrolled=True).eval(), images, **({"layer": "second"} if named else {}))
    found = explained(name, Again(unrolled=False).eval(), images, **({"layer": "block"} if named else {}))
    assert torch.allclose(found, expected, atol=1e-6)
    assert expected.std() > 0


def test_one_relu_for_all_layers_is_read_where_it_is_used_last() -> None:
    class Shared(nn.Module):
        def __init__(self, several: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Linear(6, 4)
            self.relu = nn.ReLU()
            self.other = nn.ReLU() if several else self.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.other(self.b(self.relu(self.a(x)))).mean(dim=(2, 3)))

    one, two = Shared(several=False).eval(), Shared(several=True).eval()
    assert target_layer(one, None, pictures(3, 32, 32)).use == 1
    assert torch.equal(explained("gradcam", one, pictures(3, 32, 32)), explained("gradcam", two, pictures(3, 32, 32)))


class Mean(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(dim=0)


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=3, num_classes=4, **options
    )
    for weight in made.parameters():
        weight.data += 0.2 * torch.randn_like(weight) * (weight.dim() > 1)
    return made.eval()


@pytest.mark.parametrize("name", METHODS)
def test_an_ensemble_is_not_explained_by_one_member(name: str) -> None:
    both = Mean(Pooled(body()), Pooled(body())).eval()
    with pytest.raises(NotApplicable):
        explained(name, both, pictures(3, 32, 32))
    with pytest.raises(NotApplicable):
        explained(name, Mean(vit(0), vit(1)).eval(), pictures(3, 64, 64))


def test_a_member_of_an_ensemble_can_be_named() -> None:
    first, second = Pooled(body()).eval(), Pooled(body()).eval()
    nn.init.normal_(second.fc.weight)
    found = explained("gradcam", Mean(first, second).eval(), pictures(3, 32, 32), layer="members.1.features")
    expected = explained("gradcam", second, pictures(3, 32, 32))
    assert torch.allclose(found, expected / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["cls_attention", "rollout", "attention_gradcam", "gradsam", "chefer"])
def test_attention_of_one_part_of_an_ensemble_is_refused(name: str) -> None:
    alone = vit()
    assert explained(name, nn.Sequential(alone), pictures(3, 64, 64)).shape == (2, 4, 4)
    for members in ((alone, vit(1)), (alone, Pooled(body()).eval())):
        with pytest.raises(NotApplicable, match="does not predict by one transformer alone"):
            explained(name, Mean(*members).eval(), pictures(3, 64, 64))
    with pytest.raises(NotApplicable, match="the transformer ran 2 times"):
        explained(name, Mirrored(alone).eval(), pictures(3, 64, 64))


class Gated(nn.Module):
    """Features times a gate of one channel, whose module comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.features = body()
        self.gate = nn.Sequential(nn.Conv2d(6, 1, 1), nn.Sigmoid())
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.fc((features * self.gate(features)).mean(dim=(2, 3)))


class TwoTasks(nn.Module):
    """A classifier, and a decoder that no logit depends on and that comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc, self.decoder = body(), nn.Linear(6, 4), nn.ConvTranspose2d(6, 2, 4, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return SimpleNamespace(logits=self.fc(features.mean(dim=(2, 3))), mask=self.decoder(features))


class Flipping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


class Transposing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


class Attending(nn.Module):
    """Pools by attention over pairs of cells; the matrix (B, 1, cells, cells) is the output of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.matrix, self.fc = body(), nn.Softmax(dim=-1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.features(x).flatten(2).transpose(1, 2)
        return self.fc((self.matrix((cells @ cells.transpose(1, 2))[:, None])[:, 0] @ cells).mean(dim=1))


class Parts(nn.Module):
    """Normalises images by a module, whose output has the form of the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.InstanceNorm2d(3)
        self.members = Mean(Pooled(body()), Pooled(body()))

    def forward(self, x: Tensor) -> Tensor:
        return self.members(self.normalise(x))


@pytest.mark.parametrize(
    "model",
    [
        Gated(), TwoTasks(), Attending(), Pooled(nn.Sequential(body(), Flipping())),
        Pooled(nn.Sequential(body(), Transposing())), Pooled(nn.Sequential(body(), nn.AdaptiveAvgPool2d(1))),
    ],
    ids=["gate", "decoder", "attention matrix", "flipped", "transposed", "pooled"],
)  # fmt: skip
def test_what_is_no_map_of_the_image_is_passed_over(model: nn.Module) -> None:
    model.eval()
    layer = target_layer(model, None, pictures(3, 32, 32))
    assert layer.name in ("features", "features.0")
    found, expected = (explained("gradcam", model, pictures(3, 32, 32), layer=name) for name in (None, layer.name))
    assert torch.equal(found, expected)
    assert found.shape == (2, 8, 8)


def test_the_normalised_image_is_no_feature_map() -> None:
    with pytest.raises(NotApplicable, match=r"Parts has no layer that all evidence passes through and whose cells"):
        target_layer(Parts().eval(), None, pictures(3, 32, 32))


class ChannelsLast(nn.Module):
    """The same network as `Pooled`, whose last layer gives (B, h, w, C)."""

    def __init__(self, network: Pooled) -> None:
        super().__init__()
        self.network, self.last = network, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.network.fc(self.last(self.network.features(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))


class Tokens(nn.Module):
    """The same network, whose last layer gives tokens, one prefix token of zeros first."""

    def __init__(self, network: Pooled) -> None:
        super().__init__()
        self.network, self.last = network, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        cells = self.network.features(x).flatten(2).transpose(1, 2)
        return self.network.fc(self.last(torch.cat([0 * cells[:, :1], cells], dim=1))[:, 1:].mean(dim=1))


class Flattened(Tokens):
    """The same network, whose last layer gives the tokens of the cells alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network.fc(self.last(self.network.features(x).flatten(2).transpose(1, 2)).mean(dim=1))


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("form", [ChannelsLast, Tokens])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (24, 40)])
def test_other_forms_of_the_same_features_give_the_same_map(name: str, form: type, size: tuple[int, int]) -> None:
    network = Pooled(body()).eval()
    images = pictures(3, *size)
    expected, found = explained(name, network, images), explained(name, form(network).eval(), images)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 5), (7, 7), (8, 8), (4, 6), (7, 5)])
@pytest.mark.parametrize("others", [0, 1])
def test_no_row_of_cells_is_taken_for_other_tokens(rows: int, columns: int, others: int, seed: int) -> None:
    """Without its first or last row, which may be class or register tokens, a map also keeps the order of its cells."""
    torch.manual_seed(seed)
    mixing = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    network = Pooled(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), *mixing), width=8)
    model = Tokens(network) if others else Flattened(network)
    form = target_layer(model.eval(), None, pictures(3, 8 * rows, 8 * columns)).form
    assert (form.kind, form.grid, form.prefix, form.suffix) == ("tokens", (rows, columns), others, 0)


@pytest.mark.parametrize("name", GENERAL)
def test_a_form_can_be_named(name: str) -> None:
    network, images = Pooled(body()).eval(), pictures(3, 32, 32)
    expected = explained(name, network, images)
    cases: list[tuple[nn.Module, Any]] = [
        (ChannelsLast(network), "nhwc"),
        (ChannelsLast(network), lambda output: output.permute(0, 3, 1, 2)),
        (Tokens(network), "tokens"),
        (Tokens(network), lambda output: output[:, 1:].transpose(1, 2).unflatten(2, (8, 8))),
    ]
    for model, reshape in cases:
        found = explained(name, model.eval(), images, layer="last", reshape=reshape)
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_wrong_form_is_refused() -> None:
    model, images = ChannelsLast(Pooled(body())).eval(), pictures(3, 32, 32)
    assert explained("gradcam", model, images, layer="last", reshape="nhwc").shape == (2, 8, 8)
    with pytest.raises(InputError, match=r"layer last gives no feature map .* it gives \(8, 8, 6\) per image"):
        explained("gradcam", model, images, layer="last", reshape="tokens")
    with pytest.raises(InputError, match=r"layer last gives \(2, 8, 8, 6\), which does not fit reshape="):
        explained("gradcam", model, images, layer="last", reshape=lambda output: output.view(2, 6, 9, 9))
    with pytest.raises(InputError, match=r"the feature map must be \(B, C, h, w\); reshape= gives \(2, 8, 48\)"):
        explained("gradcam", model, images, layer="last", reshape=lambda output: output.flatten(2))
    with pytest.raises(InputError, match=r"does not fit reshape= \('Tensor' object has no attribute 'cells'\)"):
        explained("gradcam", model, images, layer="last", reshape=lambda output: output.cells)
    with pytest.raises(InputError, match="reshape must be one of nchw, nhwc, tokens, or a function; got 'nwhc'"):
        EXPLAINERS.get("gradcam")(model, layer="last", reshape="nwhc")
    with pytest.raises(InputError, match="needs layer=NAME"):
        EXPLAINERS.get("gradcam")(model, reshape="nhwc")


@pytest.mark.parametrize(
    "computes",
    [
        lambda a: 2 * a,
        lambda a: a.relu(),
        lambda a: a.mean(dim=1, keepdim=True),
        lambda a: a.amax(dim=1, keepdim=True),
        lambda a: a.repeat_interleave(2, dim=3),
        lambda a: nn.functional.pad(a, (1, 1)),
        lambda a: a.roll(1, dims=0),
    ],
    ids=["twice", "relu", "mean", "maximum", "repeated", "padded", "rows"],
)
def test_a_function_that_computes_is_no_form(computes: Any) -> None:
    model, images = ChannelsLast(Pooled(body())).eval(), pictures(3, 32, 32)
    some = explained("gradcam", model, images, layer="last", reshape=lambda output: output.permute(0, 3, 1, 2)[..., 1:])
    assert some.shape == (2, 8, 7)
    for name in ("gradcam", "ablationcam"):
        with pytest.raises(InputError, match=r"layer last: reshape= must only move or drop values"):
            explained(name, model, images, layer="last", reshape=lambda output: computes(output.permute(0, 3, 1, 2)))


def test_options_that_are_unknown_are_refused_in_python() -> None:
    model, gradcam = Pooled(body()).eval(), EXPLAINERS.get("gradcam")
    gradcam(model, layer=["features.1", "features.3"], fuse="max", score="probability")
    with pytest.raises(InputError, match="fuse must be one of mean, max; got 'sum'"):
        gradcam(model, layer=["features.1", "features.3"], fuse="sum")
    with pytest.raises(InputError, match="score must be one of logit, probability; got 'p'"):
        gradcam(model, score="p")
    with pytest.raises(InputError, match="weights must be one of softmax, increase; got 'linear'"):
        EXPLAINERS.get("scorecam")(model, weights="linear")
    for layer in ([["features.1"]], ["features.1", 3], 3, ("features.1",)):
        for name in ("gradcam", "mlfem", "sise"):
            with pytest.raises(InputError, match=r"layer must be .* such as 'layer4\.1'.* or a list.*; got"):
                EXPLAINERS.get(name)(model, layer=layer)


def test_cells_that_are_not_square_are_read() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(8, 8, 3, (2, 1), 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    found = explained("gradcam", model, pictures(1, 64, 96))
    assert found.shape == (2, 16, 96)
    assert torch.equal(found, explained("gradcam", model, pictures(1, 64, 96), layer="3"))
    column = nn.Sequential(nn.Conv2d(5, 8, (3, 1), 1, (1, 0)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    column = column.append(nn.Linear(8, 4)).eval()
    assert explained("gradcam", column, pictures(5, 60, 1)).shape == (2, 60, 1)
    assert explained("gradcam", column, pictures(5, 60, 7)).shape == (2, 60, 7)


def torchvision_twin(model: Any) -> nn.Module:
    """torchvision's transformer with the weights of timm's."""
    twin = torchvision.models.VisionTransformer(64, 16, 2, 3, 24, 96, num_classes=4).eval()
    pairs = [
        (twin.class_token, model.cls_token), (twin.encoder.pos_embedding, model.pos_embed),
        (twin.conv_proj.weight, model.patch_embed.proj.weight), (twin.conv_proj.bias, model.patch_embed.proj.bias),
        (twin.encoder.ln.weight, model.norm.weight), (twin.encoder.ln.bias, model.norm.bias),
        (twin.heads.head.weight, model.head.weight), (twin.heads.head.bias, model.head.bias),
    ]  # fmt: skip
    for own, other in zip(twin.encoder.layers, model.blocks, strict=True):
        attention = own.self_attention
        modules = [
            (own.ln_1, other.norm1), (own.ln_2, other.norm2), (attention.out_proj, other.attn.proj),
            (own.mlp[0], other.mlp.fc1), (own.mlp[3], other.mlp.fc2),
        ]  # fmt: skip
        pairs += [pair for a, b in modules for pair in ((a.weight, b.weight), (a.bias, b.bias))]
        pairs += [(attention.in_proj_weight, other.attn.qkv.weight), (attention.in_proj_bias, other.attn.qkv.bias)]
    for a, b in pairs:
        a.data = b.data.clone()
    return twin


@pytest.mark.parametrize("name", GENERAL)
def test_the_same_transformer_of_timm_and_torchvision_has_the_same_map(name: str) -> None:
    model, images = vit(), pictures(3, 64, 64)
    twin = torchvision_twin(model)
    if EXPLAINERS.get(name).amplifies_rounding:
        model, twin, images = model.double(), twin.double(), images.double()
    with torch.no_grad():
        assert torch.allclose(model(images), twin(images), atol=1e-5)
    assert target_layer(twin, None, images).name == "encoder.layers.encoder_layer_1.ln_1"
    found, expected = explained(name, twin, images), explained(name, model, images)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


class ReadsTokens(nn.Module):
    """A transformer whose head reads the class token, the mean of the patches, or both."""

    def __init__(self, read: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vit, self.read = torchvision_twin(vit()), read
        self.fc = nn.Linear(48 if read == "both" else 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.vit.conv_proj(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
        tokens = self.vit.encoder(torch.cat([self.vit.class_token.expand(len(x), -1, -1), patches], dim=1))  # type: ignore[operator, union-attr]
        both = tokens[:, 0], tokens[:, 1:].mean(dim=1)
        return self.fc({"class": both[0], "mean": both[1], "both": torch.cat(both, dim=1)}[self.read])


@pytest.mark.parametrize(
    ("read", "layer"),
    [("mean", ""), ("class", ".layers.encoder_layer_1.ln_1"), ("both", ".layers.encoder_layer_1.ln_1")],
)
def test_a_class_token_that_is_read_beside_the_patches_holds_evidence(read: str, layer: str) -> None:
    model, images = ReadsTokens(read).eval(), pictures(3, 64, 64)
    assert target_layer(model, None, images).name == f"vit.encoder{layer}"


def test_without_gradients_a_class_token_that_is_read_is_seen() -> None:
    for read in ("mean", "class", "both"):
        model = ReadsTokens(read).eval()
        layer = "vit.encoder" if read == "mean" else "vit.encoder.dropout"  # before the blocks it is a constant
        model.forward = torch.no_grad()(model.forward)  # type: ignore[method-assign]
        assert target_layer(model, None, pictures(3, 64, 64)).name == layer


class Pyramid(nn.Module):
    """The mean of fine tokens and of coarse ones beside them, which are no class tokens; the fine ones weigh little."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.embed, self.cat, self.fc = nn.Conv2d(3, 1, 8, 8, bias=False), nn.Identity(), nn.Linear(1, 2, bias=False)
        self.weight = weight
        nn.init.ones_(self.embed.weight)
        self.fc.weight.data = torch.tensor([[-1.0], [1.0]])

    def forward(self, x: Tensor) -> Tensor:
        fine = self.embed(x)
        coarse = nn.functional.adaptive_avg_pool2d(fine, 2)
        coarse = coarse * torch.tensor([self.weight, 0.0])  # of the left half
        fine = fine * torch.linspace(0.001, 0.01, 8)  # more of the right half
        return self.fc(self.cat(torch.cat([fine.flatten(2), coarse.flatten(2)], dim=2).transpose(1, 2)).mean(dim=1))


def test_coarse_tokens_are_no_class_tokens() -> None:
    images = pictures(3, 64, 64)
    assert target_layer(Pyramid(0.0).eval(), None, images).name == "cat"
    model = Pyramid(1.0).eval()
    assert target_layer(model, None, images).name == "embed"
    for name in ("hirescam", "layercam"):
        found = explained(name, model, images)
        assert float(found[:, :, :4].sum()) > 5 * float(found[:, :, 4:].sum())


def test_a_replaced_layer_is_found_anew() -> None:
    model, images = Pooled(body()).eval(), pictures(3, 32, 32)
    explained("gradcam", model, images)
    model.features = nn.Sequential(body(), nn.Conv2d(6, 6, 2, 2), nn.ReLU())
    assert explained("gradcam", model, images).shape == (2, 4, 4)
    model.features[2] = nn.Identity()
    assert torch.equal(explained("gradcam", model, images), explained("gradcam", copy.deepcopy(model), images))


class Frozen(nn.Module):
    """A network whose features run without gradients."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features, self.fc = features, nn.Linear(6, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


def test_without_gradients_the_layer_that_holds_everything_is_found_by_values() -> None:
    images = pictures(3, 32, 32)
    model = Frozen(nn.Sequential(body(), nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()))).eval()
    assert target_layer(model, None, images).name == "features"
    plain = Pooled(model.features).eval()
    plain.fc = model.fc
    for name in ("activation_map", "gradcam"):  # the gradient begins at the layer
        assert torch.allclose(explained(name, model, images), explained(name, plain, images), atol=1e-7)
    with pytest.raises(NotApplicable, match=r"Mean has no layer that .* no gradient flows from the logits"):
        explained("activation_map", Mean(model, Frozen(body()).eval()).eval(), images)


def test_a_layer_that_no_logit_depends_on_is_refused_by_name() -> None:
    model = TwoTasks().eval()
    for name in ("activation_map", "gradcam"):
        assert explained(name, model, pictures(3, 32, 32), layer="features").shape == (2, 8, 8)
        with pytest.raises(NotApplicable, match="the logits do not depend on layer decoder"):
            explained(name, model, pictures(3, 32, 32), layer="decoder")


def test_names_are_those_of_the_network_in_a_classifier() -> None:
    model = Classifier(Pooled(body()), mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    images = pictures(3, 32, 32)
    found = explained("gradcam", model, images, layer="features.3")
    assert torch.equal(found, explained("gradcam", model, images))
    with pytest.raises(InputError, match="unknown layer 'feature'; did you mean 'features'"):
        explained("gradcam", model, images, layer="feature")


def test_a_search_is_no_pass_of_the_method() -> None:
    model = Pooled(body()).eval()
    with counted_passes(model) as passes:
        explained("gradcam", model, pictures(3, 32, 32))
    assert passes.images == 2


def test_a_model_is_not_kept_alive_by_what_is_known_of_it() -> None:
    import gc
    import weakref

    for make, size in ((vit, 64), (lambda: Pooled(body()).eval(), 32), (lambda: torchvision_twin(vit()), 64)):
        model = make()
        layer = target_layer(model, None, pictures(3, size, size))
        assert isinstance(layer, Layer)
        known = weakref.ref(model)
        del model, layer
        gc.collect()
        assert known() is None


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("fuse", ["mean", "max"])
def test_maps_of_several_layers_are_fused(name: str, fuse: str) -> None:
    model, images = Pooled(body()).eval(), pictures(3, 32, 32)
    found = explained(name, model, images, layer=["features.1", "features.3"], fuse=fuse)
    one, two = (explained(name, model, images, layer=layer) for layer in ("features.1", "features.3"))
    assert (one.shape, two.shape, found.shape) == ((2, 16, 16), (2, 8, 8), (2, 16, 16))
    two = nn.functional.interpolate(two[:, None], size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    scaled = []
    for each in (one, two):
        low, high = each.amin(dim=(1, 2), keepdim=True), each.amax(dim=(1, 2), keepdim=True)
        scaled.append((each - low) / (high - low).clamp(min=1e-30))
    expected = (scaled[0] + scaled[1]) / 2 if fuse == "mean" else torch.maximum(*scaled)
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="layer must name at least one layer"):
        explained(name, model, images, layer=[])


class Several(nn.Module):
    """Returns features in several tensors, of which a hook sees the first."""

    def __init__(self, split: Any) -> None:
        super().__init__()
        self.inner, self.split = body(), split

    def forward(self, x: Tensor) -> Any:
        return self.split(self.inner(x))


class Reads(nn.Module):
    def __init__(self, features: nn.Module, join: Any, width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features, self.join, self.fc = features, join, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self.features(x)))


@pytest.mark.parametrize(
    ("split", "join", "width"),
    [
        (lambda y: (y, y.amax(dim=(2, 3))), lambda z: torch.cat([z[0].mean(dim=(2, 3)), z[1]], dim=1), 12),
        (lambda y: y.chunk(2, dim=1), lambda z: torch.cat(z, dim=1).mean(dim=(2, 3)), 6),
        (lambda y: [y, y * 2], lambda z: (z[0] + z[1]).mean(dim=(2, 3)), 6),
    ],
    ids=["pooled beside", "chunks", "list"],
)
def test_a_part_of_what_a_module_returns_is_not_taken_for_all(split: Any, join: Any, width: int) -> None:
    model = Reads(Several(split), join, width).eval()
    assert target_layer(model, None, pictures(3, 32, 32)).name in ("features.inner", "features.inner.3")


def test_paths_without_a_gradient_are_seen() -> None:
    class Gate(nn.Module):
        def __init__(self, used: bool) -> None:
            super().__init__()
            self.features, self.gate, self.fc, self.used = body(), nn.Linear(3, 6), nn.Linear(6, 4), used

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x.detach().mean(dim=(2, 3))).sigmoid() if self.used else 1
            return self.fc(self.features(x).mean(dim=(2, 3)) * gate)

    assert target_layer(Gate(used=False).eval(), None, pictures(3, 32, 32)).name == "features"
    with pytest.raises(NotApplicable, match="Gate has no layer that all evidence passes"):
        target_layer(Gate(used=True).eval(), None, pictures(3, 32, 32))


def test_a_branch_of_functions_beside_a_transformer_is_seen() -> None:
    class Both(nn.Module):
        def __init__(self, used: bool) -> None:
            super().__init__()
            self.vit, self.used = torchvision_twin(vit()), used
            self.weight = nn.Parameter(torch.rand(4, 3, 8, 8) - 0.5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.vit(x)
            return logits + nn.functional.conv2d(x, self.weight).relu().mean(dim=(2, 3)) if self.used else logits

    assert target_layer(Both(used=False).eval(), None, pictures(3, 64, 64)).name.endswith("ln_1")
    with pytest.raises(NotApplicable, match="Both has no layer that all evidence passes"):
        target_layer(Both(used=True).eval(), None, pictures(3, 64, 64))


def test_a_transformer_that_pools_its_patches_is_read_after_the_last_block() -> None:
    model, images = vit(global_pool="avg"), pictures(3, 64, 64)
    a = model.forward_features(images).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(model.forward_head(a)[:, 1].sum(), a)
    expected = (g.mean(dim=1, keepdim=True) * a)[:, model.num_prefix_tokens :].sum(dim=2).relu().view(2, 4, 4)
    found = explained("gradcam", model, images)
    if target_layer(model, None, images).name == "norm":
        scale = float(expected.abs().max())
        mean = (g[:, model.num_prefix_tokens :].mean(dim=1, keepdim=True) * a)[:, model.num_prefix_tokens :].sum(dim=2)
        assert torch.allclose(found, mean.relu().view(2, 4, 4).detach(), atol=1e-5 * max(scale, 1e-6))
    else:
        assert found.any()


def test_an_unused_transformer_does_not_matter() -> None:
    model = Pooled(body()).eval()
    expected = explained("gradcam", model, pictures(3, 32, 32))
    model.teacher = vit()
    assert torch.equal(explained("gradcam", model, pictures(3, 32, 32)), expected)


def test_pixels_before_a_scripted_network_are_not_its_features() -> None:
    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5) / 0.2

    plain = nn.Sequential(Normalise(), Pooled(body())).eval()
    assert target_layer(plain, None, pictures(3, 32, 32)).name == "1.features"
    scripted = nn.Sequential(Normalise(), torch.jit.trace(Pooled(body()).eval(), pictures(3, 32, 32)))  # type: ignore[no-untyped-call]
    with pytest.raises(NotApplicable, match=r"parts made by torch\.jit cannot be read"):
        target_layer(scripted.eval(), None, pictures(3, 32, 32))


class Mixes(nn.Module):
    """Tokens of 8 × 8 cells whose order cannot be seen: mixed, or column by column."""

    def __init__(self, columns: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.mix, self.out, self.fc = (
            nn.Conv2d(3, 8, 8, 8),
            nn.Linear(64, 64),
            nn.Identity(),
            nn.Linear(8, 4),
        )
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        tokens = features.transpose(2, 3).flatten(2) if self.columns else self.mix(features.flatten(2))
        z: Tensor = self.fc(self.out(tokens.transpose(1, 2)).mean(dim=1))
        return z


@pytest.mark.parametrize(("columns", "seed"), [(True, 0), (False, 0), (False, 1), (False, 2)])
def test_tokens_that_are_named_are_cells_of_the_whole_grid(columns: bool, seed: int) -> None:
    """Row by row: the order is then the user's word."""
    model, images = Mixes(columns, seed).eval(), pictures(3, 64, 64)
    with pytest.raises(InputError, match="gives no feature map"):
        explained("hirescam", model, images, layer="out")
    found = explained("hirescam", model, images, layer="out", reshape="tokens", relu=False)
    kept: list[Tensor] = []
    handle = model.out.register_forward_hook(lambda part, args, output: kept.append(output.detach()))
    model(images)
    handle.remove()
    torch.testing.assert_close(found, (kept[0] @ model.fc.weight[1] / 64).detach().view(2, 8, 8))


class BesideViT(nn.Module):
    """A vision transformer of timm, and a part that reads its tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.vit, self.kind = (
            vit(class_token=kind == "patches", global_pool="token" if kind == "patches" else "avg"),
            kind,
        )
        self.proj, self.fc = nn.Linear(24, 8), nn.Linear(8, 4)
        self.queries = nn.Parameter(torch.randn(1, 16, 24))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "shuffled":
            tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(self.vit.patch_embed(x))[:, self.order]))
        else:
            tokens = self.vit.forward_features(x)
        if self.kind == "patches":
            tokens = tokens[:, 1:]
        if self.kind == "queries":
            tokens, _ = self.attention(self.queries.expand(len(x), -1, -1), tokens, tokens)
        z: Tensor = self.fc(self.proj(tokens).mean(dim=1))
        return z


def test_named_layers_beside_a_transformer_of_timm_are_tried() -> None:
    images = pictures(3, 64, 64)
    for name in ("proj", "vit.blocks.1"):
        assert explained("gradcam", BesideViT("plain").eval(), images, layer=name).shape == (2, 4, 4)
    for options in ({}, {"reshape": "tokens"}):  # without the class token
        assert explained("gradcam", BesideViT("patches").eval(), images, layer="proj", **options).shape == (2, 4, 4)
    for kind, name in (
        ("queries", "attention"),
        ("queries", "proj"),
        ("shuffled", "vit.blocks.1"),
        ("shuffled", "proj"),
    ):
        with pytest.raises(InputError, match="whose cells keep their positions in an image of 64 × 64"):
            explained("gradcam", BesideViT(kind).eval(), images, layer=name)


class Side(nn.Module):
    """A branch without gradients, which the logits read or not."""

    def __init__(self, reads: bool, whole: bool) -> None:
        super().__init__()
        self.body, self.side, self.fc = Pooled(body()), nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4)
        self.reads, self.whole = reads, whole

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            aside = self.fc(self.side(x).relu().mean(dim=(2, 3)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.whole):
            z: Tensor = self.body(x)
        return z + (aside if self.reads else 0)


@pytest.mark.parametrize("name", ["eigencam", "activation_map", "scorecam", "ablationcam", "fem"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_without_gradients_that_no_logit_reads_is_refused(name: str, whole: bool) -> None:
    images = pictures(3, 32, 32)
    assert explained(name, Side(True, whole).eval(), images, layer="side").any()
    with pytest.raises(NotApplicable, match="the logits do not depend on layer side"):
        explained(name, Side(False, whole).eval(), images, layer="side")
