"""The figures of the documentation that are drawn from its tables.

python docs/figures.py        # writes docs/controls.png from docs/results/posthoc.md
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent
FIGURE = DOCS / "controls.png"
CONTROLS = {
    "random": "noise",
    "fakecam": "Fake-CAM:\nall but one pixel",
    "center_gaussian": "the middle\nof the image",
    "gt_box": "the bird's box",
}
EXPLAINERS = 30


def counts(page: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Explainers that are better, and worse, than a control: by control and metric, from the table of the page."""
    table = page[page.index("| Control |") :].split("\n\n")[0].splitlines()
    metrics = [cell.strip() for cell in table[0].split("|")[2:-1]]
    found = {}
    for line in table[2:]:
        name, *cells = (cell.strip(" `") for cell in line.split("|")[1:-1])
        pairs = [re.fullmatch(r"(\d+) / (\d+)", cell) for cell in cells]
        found[name] = {
            metric: (int(pair[1]), int(pair[2])) for metric, pair in zip(metrics, pairs, strict=True) if pair
        }
    return found


def draw(found: dict[str, dict[str, tuple[int, int]]], path: Path) -> None:
    """A field per control and metric: how many explainers are better than the control."""
    from matplotlib.figure import Figure

    metrics = list(found["random"])
    figure = Figure(figsize=(7.6, 2.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    better = [[found[control][metric][0] for metric in metrics] for control in CONTROLS]
    image = axes.imshow(better, cmap="RdYlBu", vmin=0, vmax=EXPLAINERS, aspect="auto")
    for row, control in enumerate(CONTROLS):
        for column, metric in enumerate(metrics):
            more, fewer = found[control][metric]
            colour = "white" if abs(more - EXPLAINERS / 2) > 10 else "black"
            axes.text(column, row - 0.12, str(more), ha="center", va="center", fontsize=11, color=colour)
            axes.text(column, row + 0.27, f"{fewer} worse", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(metrics)), metrics)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(CONTROLS)), CONTROLS.values(), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label=f"of {EXPLAINERS} explainers,\nbetter than the control", ticks=[0, 10, 20, 30])
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    draw(counts((DOCS / "results" / "posthoc.md").read_text()), FIGURE)
    print(FIGURE.name)
