"""`metrics.csv` has a row per epoch. Checkpoints hold the row of their epoch, so that a resumed run loses none."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.files import write_whole


def row_of(trainer: pl.Trainer, phase: str) -> dict[str, Any]:
    """The row of the current epoch, for a checkpoint: Lightning saves before it logs.

    Values of `val/<metric>/<explainer>` are left out, because Lightning may still hold those of an earlier epoch.
    """
    logged = trainer.callback_metrics.items()
    row = {k: float(v) for k, v in logged if k.startswith(("train/", "val/", "lr/")) and k.count("/") == 1}
    return {**row, "phase": phase, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}


class MetricsFile(Logger):
    """Logger that writes `metrics.csv`: one row per epoch with the values of training and validation.

    The file is written whole each time. Phases are given by name; Lightning logs them as numbers. Test results are
    only in `metrics.json`, because no epoch may be selected by them.

    Args:
        run: the run folder.
        phases: names of the phases, in their order.
        checkpoint: checkpoint of a resumed run. Rows of its epochs are kept, and its own row is filled in, because the
            run may have stopped before it was written. None starts an empty file.
    """

    name, version = "metrics", ""

    def __init__(self, run: Path, phases: Sequence[str] = (), checkpoint: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.path, self.phases = run / "metrics.csv", phases
        self.rows: dict[int, dict[str, Any]] = {}
        """Rows by epoch."""
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the rows of the finished epochs."""
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a row cut short lacks cells
            for row in rows:  # earlier versions wrote several rows for an epoch
                if row.get("epoch", "").isdecimal() and int(row["epoch"]) <= checkpoint["epoch"]:
                    self._fill(int(row["epoch"]), {key: value for key, value in row.items() if value})
        if last := checkpoint["interp_models"].get("metrics"):
            self.log_metrics(last, int(last["step"]))

    @property
    def save_dir(self) -> str:
        """The run folder; Lightning's profilers write there too."""
        return str(self.path.parent)

    def validated(self, checkpoint: Mapping[str, Any], measured: str = "acc") -> dict[str, float]:
        """`val/<measured>` and `val/n` of a checkpoint's epoch; empty for a training without validation."""
        row = {**self.rows.get(checkpoint["epoch"], {}), **checkpoint["interp_models"].get("metrics", {})}
        return {key: float(row[key]) for key in (f"val/{measured}", "val/n") if key in row}

    def _fill(self, epoch: int, values: Mapping[str, Any]) -> None:
        self.rows[epoch] = {**self.rows.get(epoch, {}), **values}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add the metrics to the row of their epoch and write the file."""
        row = {key: value for key, value in metrics.items() if not key.startswith("test/")}
        if row.keys() == {"epoch"}:
            return
        if isinstance(row.get("phase"), float):
            row["phase"] = self.phases[int(row["phase"])]
        self._fill(int(row["epoch"]), {**row, "step": step})
        text = io.StringIO()
        rows = [self.rows[epoch] for epoch in sorted(self.rows)]
        writer = csv.DictWriter(text, sorted({key for row in rows for key in row}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())

    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: hyperparameters are in `config.yaml`."""
