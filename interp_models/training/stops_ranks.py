"""A signal that stops one rank stops all."""

import signal

import pytorch_lightning as pl

from interp_models.core.stopping import stop_of


class StopsRanks(pl.Callback):
    """Sends a signal that stops the first rank on to those that Lightning started."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning does so for Ctrl-C alone."""
        launcher = trainer.strategy.launcher
        if stop_of(exception) is not None and launcher is not None:
            launcher.kill(signal.SIGTERM)
