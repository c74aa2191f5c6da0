"""What every architecture promises, as functions that fail with AssertionError."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from interp_models.core.outputs import InterpOutput
from interp_models.nn.attention import find_transformer
from interp_models.training.module import InterpModule
from interp_models.training.recipe import Optimizer, Phase, Recipe, check_groups
from tests.contract.explainers import near, refusal, refused

Make = Callable[[], InterpModule]


def images(n: int = 3, height: int = 64, width: int = 64) -> Tensor:
    """Images in [0, 1]."""
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n))


def begun(make: Make) -> InterpModule:
    """A model whose state beside the parameters has seen a batch."""
    model = make()
    with torch.no_grad():
        model.observe(model.eval()(images(4)), torch.tensor([0, 1, 2, 0]))
    return model.train()


def check_output(make: Make) -> None:
    """Logits and maps of the declared kind, finite, and a pure function of the images; at two sizes if the model takes
    any."""
    model = make().eval()
    for height, width in ((64, 64), *(((96, 64),) if "any_size" in model.offers else ())):
        output = model(images(3, height, width))
        assert isinstance(output, InterpOutput), "it gives no InterpOutput"
        assert output.logits.shape == (3, model.num_classes), f"logits are {tuple(output.logits.shape)}"
        assert output.maps.dim() == 4, "maps are not (B, N, h, w)"
        assert len(output.maps) == 3, "maps are not one set per image"
        assert output.maps.shape[2] * 64 == output.maps.shape[3] * height, "maps do not follow the image's shape"
        assert all(bool(torch.isfinite(x).all()) for x in (output.logits, output.maps)), "outputs are not finite"
        assert model.signed_maps or bool((output.maps >= 0).all()), "maps below 0, but signed_maps is False"
    x = images()
    a, b = model(x), model(x)
    near(a.logits, b.logits, "other logits when asked again", rtol=0, atol=0)
    order = torch.tensor([2, 0, 1])
    near(model(x[order]).logits, a.logits[order], "other logits in another order", rtol=1e-4, atol=1e-5)
    alone = torch.cat([model(image).maps for image in x.split(1)])
    near(alone, a.maps, "other maps of an image alone", rtol=1e-4, atol=1e-5)


def check_modes(make: Make) -> None:
    """The same type with the same fields in training and in evaluation, and autocast does not change its meaning."""
    model = make()
    x = images()
    outputs = [model.train()(x), model.eval()(x)]
    assert outputs[0].aux.keys() == outputs[1].aux.keys(), "aux differs between training and evaluation"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    spread = float(outputs[1].logits.detach().std()) + 1e-3
    near(low.logits.float(), outputs[1].logits, "other logits under autocast", rtol=0.1, atol=0.3 * spread)


def check_evidence(make: Make) -> None:
    """Where the model says additive, the maps' evidence plus a constant per class is the logit; else it refuses."""
    model = make().eval()
    x = images(4)
    output = model(x)
    if not model.additive:
        labels = torch.zeros(4, dtype=torch.long)
        refused(
            lambda: model.evidence(output, labels), type(model).__name__, "evidence of a model that is not additive"
        )
        return
    for label in range(model.num_classes):
        evidence = model.evidence(output, torch.full((4,), label))
        assert evidence.shape == output.maps.shape[:2], "evidence is not one value per map"
        bias = output.logits[:, label] - evidence.sum(dim=1)
        near(bias, bias[:1].expand_as(bias), "evidence does not add up to the logit", rtol=1e-4, atol=1e-5)
        assert float(evidence.detach().std()) > 0, "evidence is constant"


def check_explain(make: Make) -> None:
    """One finite map per image of every declared kind, its own image's alone; unknown kinds are refused."""
    model = make().eval()
    x = images()
    target = torch.tensor([0, 1, 0])
    output = model(x)
    assert len(model.explanations) >= 1, "it lists no explanation"
    default = model.explain(output, target)
    near(model.explain(output, target, model.explanations[0]), default, "the default is not the first kind")
    for kind in model.explanations:
        maps = model.explain(output, target, kind)
        assert maps.dim() == 3, f"{kind} is not one map per image"
        assert len(maps) == 3, f"{kind} is not one map per image"
        assert bool(torch.isfinite(maps).all()), f"{kind} is not finite"
        alone = model.explain(model(x[1:2]), target[1:2], kind)
        near(maps[1:2], alone, f"another map {kind} of an image alone", rtol=1e-4, atol=1e-5)
    refused(lambda: model.explain(output, target, "no such kind"), "no such kind", "an unknown kind")


def check_groups_and_loss(make: Make) -> None:
    """Groups are disjoint and complete; the loss is finite and gives every group a gradient."""
    model = begun(make)
    groups = model.parameter_groups()
    line = refusal(lambda: check_groups(model, groups), "parameter groups")
    assert line is None, f"groups: {line}"
    terms = model.loss(model(images(4)), torch.tensor([0, 1, 2, 0]))
    assert terms, "the loss has no term"
    total = torch.stack(list(terms.values())).sum()
    assert bool(torch.isfinite(total)), "the loss is not finite"
    total.backward()
    for name, parameters in groups.items():
        moved = any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in parameters)
        assert moved, f"group {name} gets no gradient"


def check_gradients(make: Make) -> None:
    """The gradient in the pixels of an image is its own alone, and that of a batch of one agrees with finite steps."""
    model = begun(make).double().eval()
    x = images().double().requires_grad_(True)
    (together,) = torch.autograd.grad(model(x).logits[:, 0].sum(), x)
    for i in range(len(x)):
        one = x[i : i + 1].detach().requires_grad_(True)
        (alone,) = torch.autograd.grad(model(one).logits[:, 0].sum(), one)
        scale = float(together[i].abs().max())
        near(alone[0], together[i], "another gradient of an image alone", rtol=1e-6, atol=1e-8 * scale)
        size = 1e-8 if model.amplifies_rounding else 1e-6
        step = size * torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            change = float((model(one + step).logits - model(one - step).logits)[0, 0]) / 2
        error = abs(change - float((alone * step).sum()))
        assert error < 1e-3 * abs(change) + 1e-9 * scale, "the gradient is not that of finite steps"


def check_feature_layer(make: Make) -> None:
    """The feature layer gives (B, C, h, w), or tokens (B, T, C), that the logits are read from: it has a gradient."""
    model = begun(make).eval()
    seen: list[Tensor] = []
    handle = model.feature_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(images())
    handle.remove()
    assert len(seen) == 1, f"the feature layer was passed {len(seen)} times"
    # Explainers put the tokens of a transformer on a grid.
    assert seen[0].dim() == 4 or find_transformer(model) is not None, "the feature layer gives no map of features"
    (gradient,) = torch.autograd.grad(output.logits[:, 0].sum(), seen[0], allow_unused=True)
    assert gradient is not None, "logits do not depend on the feature layer"
    assert float(gradient.abs().sum()) > 0, "logits do not depend on the feature layer"


def check_state(make: Make) -> None:
    """The state dict carries everything: another instance that loads it gives the same output."""
    model = make().eval()
    other = make().eval()
    for parameter in other.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    near(other(images()).logits, model(images()).logits, "other logits with the same state", rtol=0, atol=0)
    near(other(images()).maps, model(images()).maps, "other maps with the same state", rtol=0, atol=0)


def check_freezing(make: Make) -> None:
    """The recipe can freeze every group on its own, and one optimizer holds them all by name."""
    for frozen in make().parameter_groups():
        model = begun(make)
        groups = model.parameter_groups()
        model.recipe = Recipe([Phase(lrs={name: 0.1 for name in groups if name != frozen})], Optimizer("sgd"))
        optimizer = model.configure_optimizers()
        names = list(dict.fromkeys(group["name"] for group in optimizer.param_groups))
        assert names == list(groups), f"the optimizer holds {names}, not {list(groups)}"
        before = {name: [p.detach().clone() for p in parameters] for name, parameters in groups.items()}
        for name, parameters in groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name != frozen)
        for group in optimizer.param_groups:
            group["lr"] = model.recipe.phases[0].lrs.get(group["name"], 0.0)
        torch.stack(list(model.loss(model(images(4)), torch.tensor([0, 1, 2, 0])).values())).sum().backward()
        optimizer.step()
        for name, parameters in groups.items():
            same = all(torch.equal(a, b) for a, b in zip(before[name], parameters, strict=True))
            assert same == (name == frozen), f"group {name} {'moved' if name == frozen else 'did not move'}"


def check_learns(make: Make) -> None:
    """Six images can be learnt by heart."""
    model = make().train()
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(x)
        torch.stack(list(model.loss(output, y).values())).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model.observe(output, y)
    assert bool((model(x).logits.argmax(dim=1) == y).all()), "six images are not learnt"


CHECKS = (
    check_output, check_modes, check_evidence, check_explain, check_groups_and_loss, check_gradients,
    check_feature_layer, check_state, check_freezing, check_learns,
)  # fmt: skip
