"""Train image classifiers that explain themselves, and judge their explanations beside post-hoc methods.

Names are imported when they are first used: `import interp_models` itself loads no other library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from interp_models.core.version import __version__

if TYPE_CHECKING:
    from interp_models.core.classifier import Classifier
    from interp_models.core.errors import InputError, NotApplicable
    from interp_models.core.outputs import InterpOutput
    from interp_models.core.scoring import probabilities
    from interp_models.data import DATASETS
    from interp_models.data.decoding import open_image
    from interp_models.evaluation.judge import judge
    from interp_models.evaluation.judgement import Judgement
    from interp_models.explainers import EXPLAINERS
    from interp_models.metrics import METRICS, PROTOTYPE_METRICS
    from interp_models.models import MODELS
    from interp_models.report import visual
    from interp_models.runs.loading import load
    from interp_models.training.module import InterpModule

_HOMES = {
    "DATASETS": "data",
    "EXPLAINERS": "explainers",
    "Classifier": "core.classifier",
    "Judgement": "evaluation.judgement",
    "METRICS": "metrics",
    "MODELS": "models",
    "PROTOTYPE_METRICS": "metrics",
    "InputError": "core.errors",
    "InterpModule": "training.module",
    "InterpOutput": "core.outputs",
    "NotApplicable": "core.errors",
    "judge": "evaluation.judge",
    "load": "runs.loading",
    "open_image": "data.decoding",
    "probabilities": "core.scoring",
}

__all__ = [
    "DATASETS",
    "EXPLAINERS",
    "METRICS",
    "MODELS",
    "PROTOTYPE_METRICS",
    "Classifier",
    "InputError",
    "InterpModule",
    "InterpOutput",
    "Judgement",
    "NotApplicable",
    "__version__",
    "judge",
    "load",
    "open_image",
    "probabilities",
    "visual",
]


def __getattr__(name: str) -> Any:
    if name == "visual":
        return globals().setdefault(name, importlib.import_module(f"{__name__}.report.visual"))
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
