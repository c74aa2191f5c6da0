"""Options of what surrounds a training: loggers, pictures, a teacher."""

from dataclasses import dataclass
from typing import Literal

from interp_models.core.written import PathText

Mode = Literal["offline", "online", "disabled"]


@dataclass
class LoggerConfig:
    """Where numbers and pictures go beside `metrics.csv`, which is always written."""

    wandb: Mode = "offline"
    """Weights & Biases: `offline` writes files to sync later, `online` sends, `disabled` does nothing."""
    project: str = "interp_models"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra `tensorboard`)."""


@dataclass
class AttentionConfig:
    """Pictures of the model's own maps during training."""

    every_n_epochs: int = 1
    """0 logs none."""
    n_images: int = 8
    """Validation images, spread over them all."""


@dataclass
class DistillationConfig:
    """Learning from a trained run beside the labels."""

    teacher: PathText | None = None
    """Run folder; null has no teacher."""
    temperature: float = 6.0
    """T, by which logits are divided."""
    weight: float = 0.5
    """λ: of the teacher's term, times T²; the loss itself is multiplied by 1 - λ."""
