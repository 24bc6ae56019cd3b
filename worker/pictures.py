"""Pictures of a model's reconstructions beside the original grids."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from server.files.datasets import PALETTE
from server.fonts import list_fonts, make_drawable, split_by_font
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
# Samples per row by the grids of each: ten fit on one screen of 1,920 pixels with grids of 160.
_SAMPLES_PER_ROW = {2: 5, 3: 3}
_SIDE, _GRID_GAP, _COLUMN_GAP = 160, 8, 24
_CAPTION_HEIGHT, _TITLE_HEIGHT = 40, 36
_TITLE_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 15, 11, 10
# Higher levels take twice as long to save a third.
_COMPRESSION = 3

_Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One grid (S, S), its reconstruction, and how good that is.

    `loss` is the grid's cross-entropy per cell in nats, without class weights, so that
    pictures of all options can be compared. `matched` is the reconstruction at the true share of
    foreground, if it is known by how much the background's logit has to be shifted for that.
    """

    original: _Image
    reconstruction: _Image
    pixel_accuracy: float
    foreground_recall: float | None
    loss: float
    matched: _Image | None = None
    matched_accuracy: float | None = None
    matched_recall: float | None = None

    @property
    def grids(self) -> list[_Image]:
        """What is drawn side by side."""
        drawn = [self.original, self.reconstruction]
        return drawn if self.matched is None else [*drawn, self.matched]

    def values(self) -> dict[str, float | None]:
        """The numbers without the grids."""
        names = (
            *("pixel_accuracy", "foreground_recall", "loss"),
            *("matched_accuracy", "matched_recall"),
        )
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
    """Makes a picture of a model with batches of one grid each, on the training thread.

    `matched_shift` is the epoch's, if it has one.
    """

    def __call__(
        self,
        model: nn.Module,
        sample_batches: list[Tensor],
        *,
        device: torch.device,
        matched_shift: float | None,
    ) -> Picture: ...


def take_reconstructions(
    model: nn.Module,
    sample_batches: list[Tensor],
    *,
    device: torch.device,
    matched_shift: float | None,
) -> ReconstructionPicture:
    return ReconstructionPicture(
        reconstruct(
            model,
            sample_batches,
            device=device,
            num_samples=len(sample_batches),
            matched_shift=matched_shift,
        )
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
    matched_shift: float | None = None,
) -> list[Reconstruction]:
    """Reconstruct the first grid of each of `num_samples` batches; see plot_reconstructions.

    With `matched_shift`, which is subtracted from the background's logit, also at the true share.
    """
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
    originals, predicted = _to_images(grids), _to_images(logits.argmax(1))
    means = losses.flatten(1).mean(1).tolist()
    samples = [_measure(*triple) for triple in zip(originals, predicted, means, strict=True)]
    if matched_shift is None:
        return samples
    logits[:, 0] -= matched_shift
    matched = _to_images(logits.argmax(1))
    return [_add_matched(*pair) for pair in zip(samples, matched, strict=True)]


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


def _to_images(grids: Tensor) -> _Image:
    return grids.cpu().numpy().astype(np.uint8)


def _measure(original: _Image, predicted: _Image, loss: float) -> Reconstruction:
    accuracy, recall = _measure_hits(original, predicted)
    return Reconstruction(original, predicted, accuracy, recall, loss)


def _add_matched(sample: Reconstruction, matched: _Image) -> Reconstruction:
    accuracy, recall = _measure_hits(sample.original, matched)
    return replace(sample, matched=matched, matched_accuracy=accuracy, matched_recall=recall)


def _measure_hits(original: _Image, predicted: _Image) -> tuple[float, float | None]:
    """Pixel accuracy and foreground recall."""
    foreground, hits = original != 0, original == predicted
    recall = float(hits[foreground].mean()) if foreground.any() else None
    return float(hits.mean()), recall


def _compose(reconstructions: list[Reconstruction], layout: "_Layout") -> _Image:
    """All samples in one image, with room for a title and for a caption above each sample."""
    image = np.full((layout.height, layout.width), _PAPER, dtype=np.uint8)
    for index, sample in enumerate(reconstructions):
        top, left = layout.corner(index)
        for grid in sample.grids:
            painted = _paint(grid)
            image[top : top + len(painted), left : left + len(painted)] = painted
            left += _SIDE + _GRID_GAP
    return image


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where samples of `num_grids` grids each are, in pixels."""

    num_samples: int
    num_grids: int

    @property
    def samples_per_row(self) -> int:
        return _SAMPLES_PER_ROW[self.num_grids]

    @property
    def sample_width(self) -> int:
        return self.num_grids * (_SIDE + _GRID_GAP) - _GRID_GAP + _COLUMN_GAP

    @property
    def width(self) -> int:
        num_columns = min(self.samples_per_row, self.num_samples)
        return _COLUMN_GAP + num_columns * self.sample_width

    @property
    def height(self) -> int:
        num_rows = -(-self.num_samples // self.samples_per_row)
        return self.corner(num_rows * self.samples_per_row)[0] - _CAPTION_HEIGHT + _COLUMN_GAP

    def corner(self, index: int) -> tuple[int, int]:
        """Top and left pixel of the sample at `index`."""
        row, column = divmod(index, self.samples_per_row)
        top = _TITLE_HEIGHT + _CAPTION_HEIGHT + row * (_SIDE + _CAPTION_HEIGHT)
        return top, _COLUMN_GAP + column * self.sample_width


def _paint(grid: npt.NDArray[np.uint8]) -> _Image:
    """The grid (S, S) in colour at about `_SIDE` pixels, with a thin line around each cell."""
    scale = _SIDE // len(grid)
    image = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    image[::scale] = image[:, ::scale] = _GRID_LINE
    return image


def _draw(reconstructions: list[Reconstruction], *, title: str) -> Image.Image:
    layout = _Layout(len(reconstructions), len(reconstructions[0].grids))
    image = Image.fromarray(_compose(reconstructions, layout))
    draw = ImageDraw.Draw(image)
    middle = _TITLE_HEIGHT / 2 + 4
    _draw_title(draw, title, at=(_COLUMN_GAP, middle))
    for index, sample in enumerate(reconstructions):
        top, left = layout.corner(index)
        label, caption = top - 21, top - 7  # baselines
        draw.text((left, label), "original", _GREY, _font(_LABEL_SIZE), anchor="ls")
        for name, values in _describe(sample):
            left += _SIDE + _GRID_GAP
            draw.text((left, label), name, _BLACK, _font(_CAPTION_SIZE), anchor="ls")
            draw.text((left, caption), values, _BLACK, _font(_CAPTION_SIZE), anchor="ls")
    # Letters were blended from black to white as palette numbers; the greys are in that order.
    image.putpalette(_PICTURE_PALETTE.tobytes())
    return image


def _draw_title(draw: ImageDraw.ImageDraw, title: str, *, at: tuple[float, float]) -> None:
    """The title, each piece of it in a font that has its letters."""
    left, middle = at
    for path, piece in split_by_font(make_drawable(title), is_bold=True):
        font = _load_font(path, _TITLE_SIZE)
        draw.text((left, middle), piece, _BLACK, font, anchor="lm")
        left += font.getlength(piece)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """For texts of our own."""
    return _load_font(list_fonts()[0], size)


@cache
def _load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _describe(sample: Reconstruction) -> Iterator[tuple[str, str]]:
    """Name and values of each grid beside the original."""
    values = _show_hits(sample.pixel_accuracy, sample.foreground_recall)
    yield "reconstruction", f"{values} · loss {sample.loss:.2f}"
    if sample.matched_accuracy is not None:
        yield "at the true share", _show_hits(sample.matched_accuracy, sample.matched_recall)


def _show_hits(accuracy: float, recall: float | None) -> str:
    return f"acc {accuracy:.3f} · fg {'none' if recall is None else f'{recall:.2f}'}"
