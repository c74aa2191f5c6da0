"""The tables of the documentation, from what registered classes say of themselves.

python -m tests.tables        # writes them into README.md and docs/*.md, between <!-- table: NAME --> and its end
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from interp_models import DATASETS, EXPLAINERS, METRICS, MODELS, PROTOTYPE_METRICS
from interp_models.core.registry import Registry
from interp_models.core.traits import TRAITS
from interp_models.core.truth import WORDS
from interp_models.data.transforms import TRANSFORMS
from tests.contract.subjects import SUBJECTS, applies

ROOT = Path(__file__).parents[1]
COMMAND = "python -m tests.tables"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->\n)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that show a table."""
    return [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if MARKED.search(page.read_text())]


def rewritten(text: str) -> str:
    """A page with its tables as they should be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], centred: int = 0) -> str:
    """A table as markdown, of which the last columns are centred."""
    marks = ["---"] * (len(head) - centred) + [":-:"] * centred
    lines = [head, marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(cls: type) -> str:
    """The first sentence of a class's docstring, or what stands before its list."""
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`²])\. (?=[A-Z`])", paragraph)[0].rstrip(".:")


def of_options(registry: Registry[Any], name: str, given: Sequence[str]) -> str:
    """Options with their defaults."""
    options = inspect.signature(registry.get(name)).parameters.values()
    shown = [
        f"`{option.name}`" + ("" if option.default is option.empty else f" ({shown_value(option.default)})")
        for option in options
        if option.name not in given and option.kind is not option.VAR_KEYWORD
    ]
    return ", ".join(shown)


def shown_value(value: object) -> str:
    """A default as yaml has it."""
    return str(value).lower() if value is True or value is False else "null" if value is None else str(value)


def listing(registry: Registry[Any], title: str, given: Sequence[str]) -> str:
    """Name, what it is, options."""
    rows = [[f"`{name}`", summary(registry.get(name)), of_options(registry, name, given)] for name in registry]
    return table([title, "What it is", "Options (defaults)"], rows)


def applicability() -> str:
    """Which explainer applies to which network, and its passes."""
    rows = []
    for name in EXPLAINERS:
        cls = EXPLAINERS.get(name)
        passes = cls.passes.replace("**2", "²").replace("*", "·")
        passes += ", forward and backward" if cls.back_to_images else ""
        rows.append([f"`{name}`", passes, *("yes" if applies(name, subject) else "–" for subject in SUBJECTS)])
    heads = [subject.head for subject in SUBJECTS.values()]
    return table(["Explainer", "Passes", *heads], rows, centred=len(heads))


def explainers() -> str:
    """What each explainer is, needs and reads."""
    rows = []
    for name in EXPLAINERS:
        cls = EXPLAINERS.get(name)
        reads = "the model" if "explain" in cls.needs else "yes" if cls.uses_class else "no"
        needs = ", ".join([*(f"`{need}`" for need in cls.needs), *(WORDS[truth] for truth in cls.shown)])
        rows.append([f"`{name}`", summary(cls), needs, reads, of_options(EXPLAINERS, name, ("model",))])
    return table(["Explainer", "What it is", "Needs", "Reads the class", "Options (defaults)"], rows)


def models() -> str:
    """What each model is, shows and offers."""
    rows = []
    for name in MODELS:
        cls = MODELS.get(name)
        kinds = ", ".join(f"`{kind}`" for kind in cls.explanations)
        rows.append([f"`{name}`", summary(cls), kinds, ", ".join(f"`{trait}`" for trait in cls.offers)])
    return table(["Model", "What it is", "Explanations, the default first", "Offers"], rows)


def metrics() -> str:
    """Every key of the metrics of maps."""
    rows = []
    for name in METRICS:
        cls = METRICS.get(name)
        words = {"score_fn": "", "logit_fn": "", "explain": "", "correct": "labels", "patch_scores": "a ViT of timm"}
        words |= {"boxes": "boxes", "mask": "masks", "part_masks": "masks of parts", "parts": "key points"}
        needs = ", ".join(dict.fromkeys(words[need] for need in cls.needs if words[need])) or "–"
        for key in cls.keys:
            others = "".join(f", `{alias}`" for alias, meant in cls.aliases.items() if meant == key)
            better = "higher" if cls.higher_is_better_by_key[key] else "lower"
            rows.append([f"`{key}`{others}", cls.legend[key], better, needs, f"`{name}`"])
    return table(["Key", "Meaning", "Better", "Needs", "Registered as"], rows)


def prototype_metrics() -> str:
    """Every key of the metrics of prototypes."""
    rows = []
    for name in PROTOTYPE_METRICS:
        cls = PROTOTYPE_METRICS.get(name)
        truth = {"parts": " with key points", "mask": " with masks"}
        needs = "none" if cls.split is None else cls.split + "".join(truth[need] for need in cls.needs)
        rows += [
            [f"`{key}`", cls.legend[key], "higher" if cls.higher_is_better_by_key[key] else "lower", needs, f"`{name}`"]
            for key in cls.keys
        ]
    return table(["Key", "Meaning", "Better", "Images", "Registered as"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "applicability": applicability,
    "datasets": lambda: listing(DATASETS, "Data set", ("split",)),
    "explainers": explainers,
    "metrics": metrics,
    "models": models,
    "prototype_metrics": prototype_metrics,
    "traits": lambda: table(["Name", "Meaning"], [[f"`{name}`", text] for name, text in TRAITS.items()]),
    "transforms": lambda: listing(TRANSFORMS, "Transform", ("size",)),
}


if __name__ == "__main__":
    for page in pages():
        page.write_text(rewritten(page.read_text()))
        print(page.relative_to(ROOT))
