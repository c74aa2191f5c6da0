"""How long the epochs of a training took, and on what."""

import io
from pathlib import Path
from time import perf_counter

import pandas as pd
import pytorch_lightning as pl
import torch

from interp_models.core.files import write_whole

FILE = "times.csv"


class EpochTimes(pl.Callback):
    """Writes `times.csv`: the seconds of every epoch with its validation, and the devices that it ran on.

    A resumed run keeps the rows of its finished epochs. The time of an epoch that was interrupted is not counted; it
    is repeated. Times stand in a file of their own, so that `metrics.csv` of a resumed run equals that of a whole run.

    Args:
        run: the run folder; None on ranks that do not write.
    """

    def __init__(self, run: Path | None) -> None:
        self.run = run
        self.rows: dict[int, tuple[float, str]] = {}
        """Seconds and devices by epoch."""
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read the rows of finished epochs."""
        if self.run is not None and trainer.current_epoch:
            rows = _read(self.run).to_numpy().tolist()
            self.rows = {epoch: (seconds, on) for epoch, seconds, on in rows if epoch < trainer.current_epoch}

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the row of this epoch."""
        if self.run is None:
            return
        device = module.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        seconds = round(perf_counter() - self._began, 2)
        self.rows[trainer.current_epoch] = (seconds, f"{trainer.world_size} x {name}")
        table = pd.DataFrame([(epoch, *row) for epoch, row in sorted(self.rows.items())], columns=COLUMNS)
        text = io.StringIO()
        table.to_csv(text, index=False)
        write_whole(self.run / FILE, text.getvalue())


COLUMNS = ["epoch", "seconds", "devices"]


def _read(run: Path) -> pd.DataFrame:
    """The rows of a run; none if the file is missing or broken."""
    try:
        table = pd.read_csv(run / FILE)[COLUMNS]
        return table.astype({"epoch": int, "seconds": float, "devices": str})
    except (OSError, ValueError, KeyError):
        return pd.DataFrame(columns=COLUMNS)


def training_cost(run: Path) -> str:
    """The cost of a training in words, such as "12 epochs, 25.3 min, 1 x cpu"; empty if it is not known."""
    table = _read(run)
    if table.empty:
        return ""
    minutes, epochs = table["seconds"].sum() / 60, len(table)
    devices = ", ".join(table["devices"].unique())
    return f"{epochs} epoch{'' if epochs == 1 else 's'}, {minutes:.1f} min, {devices}"
