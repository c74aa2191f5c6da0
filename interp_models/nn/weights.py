"""Loads weights for timm models from files of any origin: finds the tensors in the file, and checks that they fit."""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.nn.weights_file import read

WRAPPERS = frozenset(
    ("module", "_orig_mod", "model", "backbone", "trunk", "encoder", "net", "network", "student", "teacher", "ema")
)
"""First parts of tensor names that wrappers add."""
AVERAGED = frozenset(("teacher", "ema"))
"""Words in the keys of a network that is the running mean of another one in the same file."""
BOOKKEEPING = ("num_batches_tracked", "total_ops", "total_params")
"""Endings of buffers that do not influence the output: counters of batch norm and of profilers."""


class Found(NamedTuple):
    """A network within a file of weights."""

    place: str
    """Keys that lead to it, with the prefix of its tensor names."""
    state: dict[str, Tensor]
    """Its tensors, under the model's names."""


def load_file(model: Any, path: Path) -> None:
    """Load a file's weights into a timm model without classifier.

    Raises:
        InputError: as `read` and `find` do.
    """
    own = model.state_dict()
    state = find(model, read(path), path).state
    state = {key: value for key, value in state.items() if key in own}
    for key, value in state.items():
        if value.layout != torch.strided:
            raise InputError(f"weights file {path}: {key!r} is a sparse tensor; save it with .to_dense()")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"weights file {path}: {key!r} holds NaN or infinite values")
    model.load_state_dict(state, strict=False)


def with_classifier(name: str, path: Path) -> nn.Module:
    """Create a timm model with a file's weights and its classifier, for as many classes as the file has.

    Raises:
        InputError: as `read` and `find` do, and if the file has no classifier.
    """
    whole: Any = timm.create_model(name)
    state = find(timm.create_model(name, num_classes=0), read(path), path).state
    heads = classifiers(whole)
    biases = [state.get(f"{head}.weight") for head in heads]
    if not heads or any(weight is None for weight in biases):
        raise InputError(f"weights file {path} has no classifier for {name} ({', '.join(heads) or 'it has none'})")
    made: Any = timm.create_model(name, num_classes=len(biases[0]))  # type: ignore[arg-type]
    own = made.state_dict()
    missing = [key for key, value in own.items() if value.is_floating_point() and key not in state]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if missing or wrong:
        raise InputError(f"weights file {path} does not fit {name} with its classifier: {(missing or wrong)[0]!r}")
    made.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return made  # type: ignore[no-any-return]


def find(model: Any, content: Mapping[Any, Any], path: Path) -> Found:
    """Find the weights of a timm model in a file, in any container and under any prefix.

    Names and shapes must be those of the model, or those of the original authors' files if timm can convert them. A
    port with other names fits if its tensors match in order. If the file has a network and its running mean
    (`teacher`, `ema`), the mean is taken.

    Args:
        model: a timm model without classifier.
        content: result of `read`.
        path: path of the file, for messages.

    Raises:
        InputError: if no network in the file fits, or several different ones do.
    """
    name = model.default_cfg["architecture"]
    written = content.get("interp_models")
    if isinstance(written, Mapping):
        theirs = str(written.get("config", {}).get("model", {}).get("backbone"))
        if theirs.split(".")[0] != name:
            raise InputError(f"weights file {path} is a checkpoint of a model with backbone {theirs!r}, not {name!r}")
    needed = _needed(model)
    tried: list[tuple[str, dict[str, Tensor]]] = []
    plain: list[dict[str, Tensor]] = []
    groups = list(_groups(content))
    for place, group in groups:
        if 2 * len(group) >= len(needed):  # smaller groups are statistics of an optimizer
            for prefix in _prefixes(group, next(iter(needed))):
                raw = {k[len(prefix) :]: v for k, v in group.items() if k.startswith(prefix)}
                tried.append((place + prefix, raw))
                if WRAPPERS.issuperset(prefix.split(".")[:-1]):
                    plain.append(raw)
    found = [Found(place, state) for place, raw in tried if (state := _fitted(model, raw)) is not None]
    if not found:
        why = _misfit(model, plain or [group for _, group in groups])
        raise InputError(f"weights file {path} does not fit {name}: {why}")
    means = [one for one in found if AVERAGED & set(re.split(r"[._]", one.place))]
    chosen = (means or found)[0]
    for other in (means or found)[1:]:
        if not all(torch.equal(other.state[key], chosen.state[key]) for key in needed):
            raise InputError(
                f"weights file {path} holds several networks that fit {name}, {chosen.place!r} and {other.place!r}; "
                "save one of them to its own file"
            )
    return chosen


def _groups(content: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping that contains tensors, with the keys that lead to it."""
    arrays = {str(key): value for key, value in content.items() if isinstance(value, (Tensor, np.ndarray))}
    group = {key: torch.as_tensor(value).detach() for key, value in arrays.items()}
    if group:
        yield place, group
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _groups(value, f"{place}{key}.")


def _prefixes(names: Mapping[str, Any], first: str) -> list[str]:
    """Prefixes that a wrapper may have added: known ones, and any text before the model's first tensor name."""
    found = {""}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1], 1):
            if part not in WRAPPERS:
                break
            found.add(".".join(parts[:depth]) + ".")
        if name.endswith(f".{first}"):
            found.add(name.removesuffix(first))
    return sorted(found)


def _needed(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a file must have for a model: parameters and float buffers, but no counters or indices."""
    learnt = {name for name, _ in model.named_parameters()}
    state: dict[str, Tensor] = model.state_dict()
    return {key: value for key, value in state.items() if key in learnt or value.is_floating_point()}


def classifiers(model: Any) -> tuple[str, ...]:
    """Names of a timm model's classifier layers."""
    names = model.default_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fitted(model: Any, raw: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A file's tensors under the model's names; None if they do not fit."""
    if _fits(model, raw):
        return raw
    converted = _converted(model, raw)
    if converted is not None and _fits(model, converted):
        return converted
    return _by_order(model, raw)


def _fits(model: Any, state: Mapping[str, Tensor]) -> bool:
    return not _wrong(_needed(model), state) and not _surplus(model, state)


def _wrong(needed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Names of needed tensors that are missing, or have another shape or kind of number."""
    return [key for key, value in needed.items() if key not in state or not _alike(value, state[key])]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _surplus(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only a larger network has in the parts of this one, such as further blocks of a stage."""
    own = model.state_dict()
    parts = {key.split(".")[0] for key in own} - {key.split(".")[0] for key in classifiers(model)}
    return [
        key
        for key, value in state.items()
        if key not in own and key.split(".")[0] in parts and value.is_floating_point() and not key.endswith(BOOKKEEPING)
    ]


def _converted(model: Any, raw: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors after timm's own conversion of the original authors' files, which also interpolates position
    embeddings; None if timm has no conversion, or if it fails."""
    home = sys.modules[timm.model_entrypoint(model.default_cfg["architecture"]).__module__]
    convert = getattr(home, "checkpoint_filter_fn", getattr(home, "_filter_fn", None))
    if convert is None:
        return None
    try:
        try:
            state = convert(dict(raw), model)
        except TypeError:  # some of timm's conversions take no model
            state = convert(dict(raw))
    except Exception:  # a conversion may fail in any way on a file of another network
        return None
    filters = "patch_embed.proj.weight"
    if filters in raw and filters in state and state[filters].numel() != raw[filters].numel():
        return None  # timm would interpolate the filters, so another patch size would pass as a fit
    return dict(state)


def _by_order(model: Any, raw: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a port with other names, matched to the model's by their order; None if the match is not certain.

    It is certain if no name is shared, all shapes and last parts of names agree, layers begin at the same positions,
    block numbers never decrease, and no two layers of the same shape could be exchanged.
    """
    own = [key for key in model.state_dict() if not key.endswith(BOOKKEEPING)]
    theirs = [key for key in raw if not key.endswith(BOOKKEEPING)]
    names = [*own, *(f"{name}.{leaf}" for name in classifiers(model)[:1] for leaf in ("weight", "bias"))]
    if len(theirs) == len(own):
        names = own
    if len(theirs) != len(names) or raw.keys() & set(own):
        return None
    state = {key: raw[other] for key, other in zip(names, theirs, strict=True)}
    parts = [(_split(key), _split(other)) for key, other in zip(names, theirs, strict=True)]
    if any(a[1] != b[1] for a, b in parts) or _wrong(_needed(model), state):
        return None
    if any((a[0] == c[0]) != (b[0] == d[0]) for (a, b), (c, d) in itertools.pairwise(parts)):
        return None
    return state if _counts_up(theirs) and not _exchangeable(model) else None


def _split(name: str) -> tuple[str, str]:
    layer, _, leaf = name.rpartition(".")
    return layer, leaf


def _counts_up(names: Sequence[str]) -> bool:
    """Whether numbers after the same text never decrease. In files sorted by name, block 10 comes before block 2."""
    last: dict[str, int] = {}
    for name in names:
        for number in re.finditer(r"\d+", name):
            start, value = name[: number.start()], int(number[0])
            if value < last.get(start, value):
                return False
            last[start] = value
    return True


@torch.no_grad()
def _exchangeable(model: Any) -> bool:
    """Whether two layers of the same shape read the same tensor, such as query and key. Their order in a file is
    arbitrary."""
    inputs: list[Any] = []  # references keep ids unique
    seen: set[tuple[Any, ...]] = set()
    twice: list[nn.Module] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        shapes = tuple(tuple(parameter.shape) for parameter in layer.parameters(recurse=False))
        key = (id(args[0]) if args else None, shapes)
        inputs.append(args)
        if key in seen:
            twice.append(layer)
        seen.add(key)

    layers = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(note) for layer in layers]
    training = model.training
    try:
        # Without the head, which a transformer whose patch tokens are the features does not have.
        model.eval().forward_features(torch.zeros(1, *model.default_cfg["input_size"]))
    except Exception:  # unknown: assume they are
        return True
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return bool(twice)


def _misfit(model: Any, tried: Sequence[Mapping[str, Tensor]]) -> str:
    """The reason why a file does not fit a model, from the most similar network in it."""
    needed = _needed(model)
    if not tried:
        return "it holds no named tensors"
    best = min(tried, key=lambda raw: len(_wrong(needed, raw)))
    wrong = _wrong(needed, best)
    if not wrong:
        return f"it belongs to a larger network, with {_surplus(model, best)[0]!r}"
    first = wrong[0]
    shapes = f" {tuple(best[first].shape)} instead of {tuple(needed[first].shape)}" if first in best else ""
    kind = f", of {best[first].dtype}" if shapes and best[first].shape == needed[first].shape else ""
    theirs, ours = (", ".join(map(repr, list(names)[:3])) for names in (best, needed))
    return (
        f"{len(wrong)} of {len(needed)} tensors are missing or of another shape, the first {first!r}{shapes}{kind}; "
        f"the file begins with {theirs}, the model with {ours}"
    )
