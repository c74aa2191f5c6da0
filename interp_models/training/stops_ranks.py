"""`StopsRanks`: a signal that stops one rank stops all ranks."""

import signal

import pytorch_lightning as pl

from interp_models.core.stopping import stop_of


class StopsRanks(pl.Callback):
    """Passes a signal that stops rank 0 on to the ranks that Lightning started."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the other ranks; Lightning itself does so only for Ctrl-C."""
        launcher = trainer.strategy.launcher
        if stop_of(exception) is not None and launcher is not None:
            launcher.kill(signal.SIGTERM)
