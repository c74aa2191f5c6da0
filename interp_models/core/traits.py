"""Traits of networks that methods need beside logits."""

from typing import Literal

Trait = Literal[
    "any_size",
    "attention",
    "explain",
    "mean_and_linear",
    "piecewise_linear",
    "plain_cnn",
    "relu",
    "rescale",
    "rescale_tail",
    "rules",
]

TRAITS: dict[Trait, str] = {
    "any_size": "The network takes images of other sizes, too; a transformer, of a whole number of patches.",
    "attention": "The network is, or contains, a vision transformer of timm with a class token.",
    "explain": "The network explains itself by a method `explain`.",
    "mean_and_linear": "After the last feature map, the network has only the mean over cells and a linear layer.",
    "piecewise_linear": "Logits are piecewise linear in the image: convolutions, linear layers, batch norms, ReLU and "
    "pools, but no product of two features.",
    "plain_cnn": "The network has only convolutions, linear layers, pooling, batch norm, ReLU or ReLU6, sums and "
    "concatenations.",
    "relu": "All activations are ReLU or ReLU6.",
    "rescale_tail": "DeepLIFT's rescale rule covers all layers after the last feature map: linear maps, means and "
    "activations, but no product of two features.",
    "rescale": "DeepLIFT's rules cover the whole network: weights, sums, functions of one value, products, quotients, "
    "norms, attention and maxima, but no values that depend on the image without a gradient.",
    "rules": "LRP's rules cover the whole network: as `rescale`, but of functions of one value only activations.",
}
"""Meaning of each trait."""
