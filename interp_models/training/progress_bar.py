"""The progress bar."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from interp_models.training.module import InterpModule


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the name of the phase in place of the version number."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values that the bar shows at its end."""
        assert isinstance(pl_module, InterpModule)
        items = {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}
        return {"phase": pl_module.recipe.at(trainer.current_epoch)[0].name, **items} if trainer.training else items
