"""Checks of a data set before any work: broken files, and left-out images."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from interp_models.core.errors import InputError
from interp_models.data.base import ImageDataset
from interp_models.data.decoding import ADVICE, AMBIGUOUS, BROKEN, MISSING, looks_whole

KINDS = {
    BROKEN: "images that cannot be decoded",
    MISSING: "images that are missing",
    AMBIGUOUS: "images that are ambiguous",
}
MOST_NAMES = 3


def unusable(images: ImageDataset, indices: Iterable[int], *, decode: bool) -> dict[int, str]:
    """Why images cannot be loaded, by their index: of all that are decoded, or of those whose files do not look whole.

    Looking costs 0.04 seconds per 1000 images that the system has in memory; images of more than 8 bits are decoded.
    """
    found = {}
    for index in map(int, indices):
        if decode or not all(map(looks_whole, images.files(index))):
            try:
                images.load(index)
            except InputError as error:
                found[index] = str(error)
    return found


def refuse(reasons: Sequence[str]) -> None:
    """Raise `InputError` for images that cannot be loaded, with the first one's reason."""
    if reasons:
        many = f"{len(reasons)} images cannot be used; the first: " if len(reasons) > 1 else ""
        raise InputError(f"{many}{reasons[0]}")


def by_kind(reasons: Mapping[str, str]) -> dict[str, str]:
    """Text on left-out entries, by kind; `reasons` are by image name."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        kind = next((text for mark, text in KINDS.items() if f" {mark}" in reason), "images that cannot be loaded")
        names[kind].append(name)
    return {
        kind: f"{some(own)}; the first: {reasons[own[0]].removesuffix(f'; {ADVICE}')}" for kind, own in names.items()
    }


def some(names: Sequence[str]) -> str:
    """The count and the first few names.

    >>> some(["a", "b", "c", "d"])
    '4 (a, b, c, ...)'
    """
    return f"{len(names)} ({', '.join([*names[:MOST_NAMES], *['...'] * (len(names) > MOST_NAMES)])})"
