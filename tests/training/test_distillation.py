"""The loss of a student, by hand; and that the teacher stays outside."""

from pathlib import Path

import numpy as np
import pytest
import torch

import interp_models
from interp_models.training.distillation import Distillation
from tests.conftest import BCNN_LRS, Cub, Script, copy_run, fit, tiny_config, write_config
from tests.mutation import mutated


class Says(torch.nn.Module):
    """A teacher whose logits do not depend on the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def check_terms(cls=Distillation):
    """Σ_k t_k (ln t_k - ln s_k), by loops in float64."""
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(3, 4)) * 3, rng.normal(size=(3, 4)) * 3
    temperature, weight = 2.5, 0.3
    apart = []
    for a, b in zip(t / temperature, s / temperature, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        apart.append(sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(4)))
    distillation = cls(Says(torch.tensor(t)), temperature=temperature, weight=weight)
    terms = distillation.terms({"ce": torch.tensor(2.0)}, torch.tensor(s), torch.zeros(3, 3, 2, 2))
    assert terms["ce"].item() == pytest.approx(0.7 * 2.0)
    assert terms["distillation"].item() == pytest.approx(0.3 * 2.5**2 * np.mean(apart))


def test_terms():
    check_terms()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.temperature**2", "self.temperature"),
        ('reduction="batchmean"', 'reduction="sum"'),
        ("(1 - self.weight) * term", "term"),
        ("F.kl_div(learnt, F.log_softmax(taught, dim=1)", "F.kl_div(F.log_softmax(taught, dim=1), learnt"),
        ("(images)) / self.temperature", "(images))"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_terms(mutated("interp_models.training.distillation", right, wrong).Distillation)


def config_of(root: Path, teacher: Path, out: Path):
    distillation = {"teacher": str(teacher), "temperature": 4.0, "weight": 0.9}
    phases = [{"epochs": 2, "lrs": BCNN_LRS}]
    return tiny_config(root, out=str(out), phases=phases) | {"distillation": distillation}


def test_a_training(tiny_cub: Cub, bcnn_run: Path, tmp_path: Path) -> None:
    """The teacher's weights stay, none are in the checkpoint, and the student's are those of a training alone if λ = 0;
    the student can be loaded when its teacher is gone."""
    teacher = copy_run(bcnn_run, tmp_path / "tiny" / "teacher")
    before = interp_models.load(teacher)[0].state_dict()
    out = tmp_path / "tiny" / "student"
    fit(config_of(tiny_cub.root, teacher, out))
    after = interp_models.load(teacher)[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    checkpoint = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == before.keys()
    assert "train/distillation" in (out / "metrics.csv").read_text().splitlines()[0]
    teacher.rename(tmp_path / "gone")
    student, _ = interp_models.load(out, "last")
    assert any(not torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_bad_teachers_are_refused(script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path) -> None:
    node = config_of(tiny_cub.root, tmp_path / "nothing", tmp_path / "out")
    outcome = script("train", write_config(tmp_path / "c.yaml", node))
    assert outcome.code == 2
    assert "distillation.teacher" in outcome.err
    assert "is not a run folder" in outcome.err
    assert not (tmp_path / "out").exists()
    node = config_of(tiny_cub.root, bcnn_run, tmp_path / "out")
    outcome = script("train", write_config(tmp_path / "c.yaml", node), "distillation.weight=1.5")
    assert outcome.code == 2
    assert "weight from 0 to 1" in outcome.err
    run = copy_run(bcnn_run, tmp_path / "other")
    node = config_of(tiny_cub.root, run, tmp_path / "out")
    outcome = script("train", write_config(tmp_path / "c.yaml", node), "data.image_size=96")
    assert outcome.code == 2
    assert f"distillation.teacher: {run} has data.image_size=64, not 96" in outcome.err
    (path,) = (run / "checkpoints").glob("best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["interp_models"]["classes"].reverse()
    torch.save(checkpoint, path)
    outcome = script("train", write_config(tmp_path / "c.yaml", node))
    assert outcome.code == 2
    names = "was trained with '003.Kind_3' as class 0, the data set has '001.Kind_1' there"
    assert f"distillation.teacher: {run}: {names}" in outcome.err
    assert not (tmp_path / "out").exists()


def test_another_teacher_is_refused_when_a_training_goes_on(
    script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path
) -> None:
    """The path is the same, but the run behind it has been trained further."""
    teacher = copy_run(bcnn_run, tmp_path / "teacher")
    out = tmp_path / "tiny" / "student"
    fit(config_of(tiny_cub.root, teacher, out))
    assert script("train", f"resume={out}", "phases[0].epochs=3").code == 0
    (path,) = (teacher / "checkpoints").glob("best.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["head.bias"] += 1
    torch.save(checkpoint, path)
    outcome = script("train", f"resume={out}", "phases[0].epochs=4")
    assert outcome.code == 2
    assert "distillation.teacher: its weights differ from those that this training began with" in outcome.err


def test_a_teacher_follows_the_students_precision():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    distillation = Distillation(teacher, temperature=2.0, weight=0.5)
    terms = distillation.terms({}, torch.zeros(2, 4).double(), torch.rand(2, 3, 2, 2).double())
    assert terms["distillation"].dtype == torch.float64
