"""Traits that networks offer beside logits and that methods need."""

from typing import Literal

Trait = Literal["attention", "explain", "mean_and_linear", "relu", "rescale_tail"]

TRAITS: dict[Trait, str] = {
    "attention": "It is, or holds, a vision transformer of timm with a class token.",
    "explain": "It explains itself, by `explain`.",
    "mean_and_linear": "It ends, after its last feature map, in the mean over cells and a linear layer.",
    "relu": "Its activations are ReLU or ReLU6 alone.",
    "rescale_tail": "DeepLIFT's rescale rule covers all that comes after its last feature map: linear maps, means and "
    "activations, but no product of two features.",
}
"""Meaning of each trait."""
