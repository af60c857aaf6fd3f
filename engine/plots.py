"""Plots and images of a run: curves, grids of samples, and their GIF."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import write_atomically


def plot_curves(history: list[dict], curve: list[dict], path: Path) -> None:
    """One panel per metric: reports during training as a line, validation after each epoch as dots."""
    from matplotlib.figure import Figure  # imported late, like torchvision and Pillow below: it takes a while
    from matplotlib.ticker import MaxNLocator

    panels = {name: [(curve, name, "-", "training")] for name in names_of(curve)}
    for key in names_of(history):
        if key.startswith("val_"):
            name = key.removeprefix("val_")
            panels.setdefault(name if name in panels else key, []).append((history, key, "o-", "validation"))
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for place, (name, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place, xlabel="epoch", ylabel=name)
        for table, key, style, label in lines:
            points = [(row["epoch"], row[key]) for row in table if key in row]
            axis.plot(*zip(*points), style if len(points) > 1 else "o", lw=1, ms=3, label=label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def names_of(rows: list[dict]) -> list[str]:
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name != "epoch"]


def save_figure(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())


def save_grid(images: torch.Tensor, path: Path, columns: int, scale: int = 2, captions: Sequence[str] = ()) -> None:
    """Write images [N, 1, H, W], pixels from 0 (black) to 1 (white), as one PNG, row by row, `scale` times as large.

    captions: a text for each image, written above it; at scale 3, about thirteen letters fit.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    if captions:
        images = torch.nn.functional.pad(images, (0, 0, 5, 0))
    grid = make_grid(images.float().cpu(), nrow=columns, padding=0)[0]  # it repeats a grey channel three times
    image = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    height, width = (scale * side for side in images.shape[2:])
    for i, caption in enumerate(captions):
        write(caption, image, (i % columns * width + 2, i // columns * height + 1))
    content = io.BytesIO()
    image.save(content, format="png")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, content.getvalue())


def write(text: str, image: Any, place: tuple[int, int]) -> None:
    """Write `text` in white into a PIL image. Pillow's own font has hardly more than ASCII."""
    from matplotlib import get_data_path
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)


def save_gif(folder: Path, most: int = 40) -> None:
    """Write samples.gif from up to `most` of the images in samples/, evenly spaced, the last one included."""
    from PIL import Image

    paths = sorted((folder / "samples").glob("epoch-*.png"), key=lambda path: (len(path.name), path.name))
    if not paths:
        return
    every = -(-len(paths) // most)
    frames = [Image.open(path) for path in paths[::-every][::-1]]
    content = io.BytesIO()
    frames[0].save(content, format="gif", save_all=True, append_images=frames[1:], duration=200, loop=0)
    write_atomically(folder / "samples.gif", content.getvalue())
