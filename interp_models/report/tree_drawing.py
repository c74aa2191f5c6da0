"""Draw a binary decision tree as SVG, from left to right. Nodes show pictures, leaves show classes."""

from collections.abc import Mapping
from html import escape

import numpy as np
from PIL import Image

from interp_models.nn.soft_tree import TreeNode
from interp_models.report import visual
from interp_models.report.visual import Picture

CELL, GAP, COLUMN = 44, 8, 120
"""Pixels: side of a node's picture, space between rows, distance between levels."""


def tree_svg(root: TreeNode, pictures: Mapping[int, Picture]) -> str:
    """Draw a tree as a self-contained SVG.

    Args:
        root: root of the tree.
        pictures: pictures of the nodes by number; a node without a picture shows only its number.
    """
    shapes: list[str] = []
    rows = levels = 0

    def draw(node: TreeNode, level: int) -> float:
        """Draw a node after its children; returns the vertical position of its middle."""
        nonlocal rows, levels
        levels = max(levels, level)
        x = level * COLUMN + GAP
        if node.left is None or node.right is None:
            middle = rows * (CELL + GAP) + GAP + CELL / 2
            rows += 1
            shapes.append(f'<text x="{x}" y="{middle + 4:.1f}">{escape(node.label)}</text>')
            return middle
        ends = [draw(child, level + 1) for child in (node.right, node.left)]
        middle = sum(ends) / 2
        for end, word in zip(ends, ("present", "absent"), strict=True):
            far = x + COLUMN - GAP
            shapes.append(f'<path d="M{x + CELL} {middle:.1f} L{far} {end:.1f}"><title>{word}</title></path>')
        shapes.append(_node(node.number, pictures.get(node.number), x, middle - CELL / 2))
        return middle

    draw(root, 0)
    width, height = levels * COLUMN + 260, rows * (CELL + GAP) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        "<style>text{font:12px sans-serif;fill:#222}path{stroke:#888;fill:none}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(shapes)}</svg>'
    )


def _node(number: int, picture: Picture | None, x: float, y: float) -> str:
    title = f"<title>prototype {number}</title>"
    if picture is None:
        frame = f'<rect x="{x}" y="{y:.1f}" width="{CELL}" height="{CELL}" fill="#eee"/>'
        return f'<g>{title}{frame}<text x="{x + 4}" y="{y + CELL / 2:.1f}">{number}</text></g>'
    uri = visual.jpeg_uri(np.asarray(Image.fromarray(picture).resize((CELL, CELL))))
    return f'<g>{title}<image href="{uri}" x="{x}" y="{y:.1f}" width="{CELL}" height="{CELL}"/></g>'
