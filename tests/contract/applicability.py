"""What applies to what, written by hand, with the passes of each method; the table of the documentation.

python -m tests.contract.applicability        # prints the table for docs/explainers.md
"""

OURS = ("cnn", "bcnn", "wsdan", "cal", "br_npa", "dpnet", "protopnet", "prototree", "vit_cls")
ALL = (*OURS, "resnet18", "vgg", "vit", "sequential")
TRANSFORMERS = ("vit_cls", "vit")
RELU = ("resnet18", "vgg", "sequential")
"""Our models here stand on a trunk of SiLU, or GELU; prototypes have a sigmoid before them, too."""
MEAN_AND_LINEAR = ("cnn", "resnet18", "sequential")

APPLIES = {
    "ablationcam": ALL,
    "activation_map": ALL,
    "attention_gradcam": TRANSFORMERS,
    "cam": MEAN_AND_LINEAR,
    "center_gaussian": ALL,
    "chefer": TRANSFORMERS,
    "cls_attention": TRANSFORMERS,
    "deconvnet": RELU,
    "edges": ALL,
    "eigencam": ALL,
    "fakecam": ALL,
    "grad_x_input": ALL,
    "gradcam": ALL,
    "gradcam_pp": ALL,
    "gradient": ALL,
    "gradsam": TRANSFORMERS,
    "gt_background": ALL,
    "gt_box": ALL,
    "guidancecam": ALL,
    "guided_backprop": RELU,
    "hirescam": ALL,
    "integrated_gradients": ALL,
    "integrated_guided_backprop": RELU,
    "integrated_smoothgrad": ALL,
    "intrinsic": OURS,
    "kernelshap": ALL,
    "layercam": ALL,
    "liftcam": ("cnn", "br_npa", "dpnet", "resnet18", "vgg", "sequential"),
    "lime": ALL,
    "occlusion": ALL,
    "opticam": ALL,
    "random": ALL,
    "rise": ALL,
    "rollout": TRANSFORMERS,
    "scorecam": ALL,
    "smoothed_guided_backprop": RELU,
    "smoothed_integrated_gradients": ALL,
    "smoothgrad": ALL,
    "smoothgrad_squared": ALL,
    "vargrad": ALL,
    "xgradcam": ALL,
}
"""Which explainer applies to which model. Everywhere else it refuses, and says why."""

PASSES = {
    **dict.fromkeys(APPLIES, "1"),
    **dict.fromkeys(("center_gaussian", "edges", "fakecam", "gt_background", "gt_box", "random"), "0"),
    "rise": "masks + 1",
    "occlusion": "windows + 1",
    "lime": "samples + 1",
    "kernelshap": "samples + 3",
    "scorecam": "channels + 1",
    "opticam": "steps + 1",
    "integrated_gradients": "steps",
    "integrated_guided_backprop": "steps",
    **dict.fromkeys(("smoothgrad", "smoothgrad_squared", "vargrad", "smoothed_guided_backprop"), "samples"),
    "smoothed_integrated_gradients": "samples * steps",
    "integrated_smoothgrad": "samples * steps",
}
"""Forward passes of an image where the class is given, on a network that ends in a mean and a linear layer."""

BACKWARD = {
    "gradient", "grad_x_input", "deconvnet", "guided_backprop", "opticam", "integrated_gradients",
    "integrated_guided_backprop", "integrated_smoothgrad", "smoothed_guided_backprop", "smoothed_integrated_gradients",
    "smoothgrad", "smoothgrad_squared", "vargrad",
}  # fmt: skip
"""Methods whose passes go back to the images, too."""

HEADS = (*(f"`{name}`" for name in OURS), "ResNet", "VGG", "ViT", "Sequential")


def table() -> str:
    """The table, as markdown."""
    lines = [f"| Explainer | Passes | {' | '.join(HEADS)} |", "| --- | --- |" + " :-: |" * len(HEADS)]
    for name, applies in APPLIES.items():
        passes = PASSES[name].replace("*", "·") + (", there and back" if name in BACKWARD else "")
        lines.append(f"| `{name}` | {passes} | {' | '.join('yes' if s in applies else '–' for s in ALL)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
