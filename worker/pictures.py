"""Pictures of a model's reconstructions beside the original grids."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from server.files.datasets import PALETTE
from server.models.configuration import NUM_COLOURS
from server.models.tables import ArtifactKind
from worker.losses import compute_focal_loss

# One byte per pixel: a grid's colour, or one of the greys of paper, lines and letters. That is a
# third of the bytes of RGB, and keeps every colour exact.
_GREYS = np.linspace(0, 255, 256 - NUM_COLOURS).round().astype(np.uint8)
_PICTURE_PALETTE = np.concatenate([PALETTE, np.stack([_GREYS] * 3, axis=1)])
_BLACK, _GRID_LINE, _GREY, _PAPER = (
    NUM_COLOURS + int(np.searchsorted(_GREYS, level)) for level in (0x00, 0x33, 0x55, 0xFF)
)
# Five pairs per row: ten fit on one screen of 1,920 pixels with grids of 160.
_PAIRS_PER_ROW = 5
_SIDE, _PAIR_GAP, _COLUMN_GAP = 160, 8, 24
_CAPTION_HEIGHT, _TITLE_HEIGHT = 40, 36
_TITLE_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 15, 11, 10
# Higher levels take twice as long to save a third.
_COMPRESSION = 3

_Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One grid (S, S), its reconstruction, and how good that is.

    `loss` is the grid's cross-entropy per cell in nats, without class weights, so that
    pictures of all options can be compared.
    """

    original: npt.NDArray[np.uint8]
    reconstruction: npt.NDArray[np.uint8]
    pixel_accuracy: float
    foreground_recall: float | None
    loss: float

    def values(self) -> dict[str, float | None]:
        """The numbers without the grids."""
        names = ("pixel_accuracy", "foreground_recall", "loss")
        return {name: getattr(self, name) for name in names}


class Picture(Protocol):
    """What a picture shows, copied from a model whose training continues."""

    def render(self, path: Path, *, title: str) -> None:
        """Write it as a PNG."""

    def describe_samples(self) -> list[dict[str, float | None]]:
        """The values of each sample, for the row that names the picture."""


@dataclass(frozen=True, slots=True)
class ReconstructionPicture:
    """Training grids beside their reconstructions."""

    reconstructions: list[Reconstruction]

    def render(self, path: Path, *, title: str) -> None:
        render_reconstructions(self.reconstructions, path, title=title)

    def describe_samples(self) -> list[dict[str, float | None]]:
        return [sample.values() for sample in self.reconstructions]


class TakePicture(Protocol):
    """Makes a picture of a model with batches of one grid each, on the training thread."""

    def __call__(
        self, model: nn.Module, sample_batches: list[Tensor], *, device: torch.device
    ) -> Picture: ...


def take_reconstructions(
    model: nn.Module, sample_batches: list[Tensor], *, device: torch.device
) -> ReconstructionPicture:
    num_samples = len(sample_batches)
    return ReconstructionPicture(
        reconstruct(model, sample_batches, device=device, num_samples=num_samples)
    )


#: The pictures of each kept epoch. A new one is a function and an entry here, with a member of
#: `ArtifactKind` and its file name in `server.files.artifacts`.
PICTURES: Final[dict[ArtifactKind, TakePicture]] = {
    ArtifactKind.reconstruction: take_reconstructions
}


def plot_reconstructions(
    model: nn.Module,
    dataloader: Iterable[Tensor],
    device: torch.device | str,
    num_samples: int = 6,
    save_path: Path | str | None = None,
    show: bool = True,
) -> list[Reconstruction]:
    """Draw the first grid of each of `num_samples` batches beside its reconstruction.

    `dataloader` yields integer batches (B, S, S). The model runs in eval mode without
    gradients and returns to the mode that it was in. Writes a PNG to `save_path` and
    opens a window if `show`.
    """
    reconstructions = reconstruct(model, dataloader, device=device, num_samples=num_samples)
    if save_path is not None:
        render_reconstructions(reconstructions, Path(save_path))
    if show:
        _open_window(reconstructions)
    return reconstructions


def reconstruct(
    model: nn.Module,
    dataloader: Iterable[Tensor],
    *,
    device: torch.device | str,
    num_samples: int,
) -> list[Reconstruction]:
    """Reconstruct the first grid of each of `num_samples` batches; see plot_reconstructions."""
    batches = zip(range(num_samples), dataloader, strict=False)
    grids = torch.cat([batch[:1] for _, batch in batches]).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(grids).logits
            ones = torch.ones(NUM_COLOURS, device=logits.device)
            losses = compute_focal_loss(logits, targets=grids, class_weights=ones, gamma=0.0)
    finally:
        model.train(was_training)
    originals = grids.cpu().numpy().astype(np.uint8)
    predicted = logits.argmax(1).cpu().numpy().astype(np.uint8)
    means = losses.flatten(1).mean(1).tolist()
    return [_measure(*triple) for triple in zip(originals, predicted, means, strict=True)]


def render_reconstructions(
    reconstructions: list[Reconstruction], path: Path, *, title: str = ""
) -> None:
    """Write the picture as a PNG, in about 10 ms; matplotlib takes 15 times as long."""
    image = _draw(reconstructions, title=title)
    image.save(path, format="png", compress_level=_COMPRESSION)


def _open_window(reconstructions: list[Reconstruction]) -> None:
    # Only a window needs pyplot, and importing it takes longer than drawing a picture.
    import matplotlib.pyplot as plt  # noqa: PLC0415

    image = _draw(reconstructions, title="").convert("RGB")
    figure = plt.figure(figsize=(image.width / 100, image.height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(image), interpolation="none", aspect="auto")
    axes.set_axis_off()
    plt.show()
    plt.close(figure)


def _measure(original: _Image, predicted: _Image, loss: float) -> Reconstruction:
    foreground = original != 0
    hits = original == predicted
    return Reconstruction(
        original=original,
        reconstruction=predicted,
        pixel_accuracy=float(hits.mean()),
        foreground_recall=float(hits[foreground].mean()) if foreground.any() else None,
        loss=loss,
    )


def _compose(reconstructions: list[Reconstruction]) -> _Image:
    """All pairs in one image, with room for a title and for a caption above each pair."""
    num_rows = -(-len(reconstructions) // _PAIRS_PER_ROW)
    num_columns = min(_PAIRS_PER_ROW, len(reconstructions))
    height = _corner(num_rows * _PAIRS_PER_ROW)[0] - _CAPTION_HEIGHT + _COLUMN_GAP
    width = _COLUMN_GAP + num_columns * (2 * _SIDE + _PAIR_GAP + _COLUMN_GAP)
    image = np.full((height, width), _PAPER, dtype=np.uint8)
    for index, pair in enumerate(reconstructions):
        top, left = _corner(index)
        for grid in (pair.original, pair.reconstruction):
            painted = _paint(grid)
            image[top : top + len(painted), left : left + len(painted)] = painted
            left += _SIDE + _PAIR_GAP
    return image


def _corner(index: int) -> tuple[int, int]:
    """Top and left pixel of the pair at `index`."""
    row, column = divmod(index, _PAIRS_PER_ROW)
    top = _TITLE_HEIGHT + _CAPTION_HEIGHT + row * (_SIDE + _CAPTION_HEIGHT)
    return top, _COLUMN_GAP + column * (2 * _SIDE + _PAIR_GAP + _COLUMN_GAP)


def _paint(grid: npt.NDArray[np.uint8]) -> _Image:
    """The grid (S, S) in colour at about `_SIDE` pixels, with a thin line around each cell."""
    scale = _SIDE // len(grid)
    image = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    image[::scale] = image[:, ::scale] = _GRID_LINE
    return image


def _draw(reconstructions: list[Reconstruction], *, title: str) -> Image.Image:
    image = Image.fromarray(_compose(reconstructions))
    draw = ImageDraw.Draw(image)
    middle = _TITLE_HEIGHT / 2 + 4
    draw.text((_COLUMN_GAP, middle), title, _BLACK, _font(_TITLE_SIZE, is_bold=True), anchor="lm")
    for index, pair in enumerate(reconstructions):
        top, left = _corner(index)
        right = left + _SIDE + _PAIR_GAP
        label, caption = top - 21, top - 7  # baselines
        draw.text((left, label), "original", _GREY, _font(_LABEL_SIZE), anchor="ls")
        draw.text((right, label), "reconstruction", _BLACK, _font(_CAPTION_SIZE), anchor="ls")
        draw.text((right, caption), _caption(pair), _BLACK, _font(_CAPTION_SIZE), anchor="ls")
    # Letters were blended from black to white as palette numbers; the greys are in that order.
    image.putpalette(_PICTURE_PALETTE.tobytes())
    return image


@cache
def _font(size: int, *, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it, which has the letters of most languages; found
    without importing matplotlib, which would take half a second."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name, size)


def _caption(pair: Reconstruction) -> str:
    recall = "none" if pair.foreground_recall is None else f"{pair.foreground_recall:.2f}"
    return f"acc {pair.pixel_accuracy:.3f} · fg {recall} · loss {pair.loss:.2f}"
