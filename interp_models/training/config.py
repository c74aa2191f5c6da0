"""Options of loggers, of pictures during training, and of distillation."""

from dataclasses import dataclass
from typing import Literal

from interp_models.core.written import PathText

Mode = Literal["offline", "online", "disabled"]


@dataclass
class LoggerConfig:
    """Loggers beside `metrics.csv`, which is always written."""

    wandb: Mode = "offline"
    """Weights & Biases: `offline` writes files to sync later, `online` sends at once, `disabled` logs nothing."""
    project: str = "interp_models"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra `tensorboard`)."""


@dataclass
class AttentionConfig:
    """Pictures of the model's own maps during training."""

    every_n_epochs: int = 1
    """Number of epochs from one picture to the next; 0 draws none."""
    n_images: int = 8
    """Number of images, spread evenly over the validation set."""


@dataclass
class DistillationConfig:
    """Knowledge distillation: the student also learns the outputs of a trained teacher."""

    teacher: PathText | None = None
    """Run folder of the teacher; null trains without one."""
    temperature: float = 6.0
    """Temperature T: the logits of teacher and student are divided by it."""
    weight: float = 0.5
    """Weight λ in [0, 1]: the teacher's term is multiplied by λ T², the student's own loss by 1 - λ."""
