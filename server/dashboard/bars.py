"""The last epoch's KL and information per latent dimension as bars: SVG, complete without a script.

A dimension whose posterior is far from the prior but the same for every grid has a large KL and
says nothing (Hoffman and Johnson, 2016). The bar of its information stands before that of its KL,
so that it is seen at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from server.dashboard.drawings import HEIGHT, draw_grid, write_values
from server.dashboard.scales import Scale, make_linear_scale
from server.judging.numbers import format_number
from server.models.epochs import EpochMetrics

#: A dimension is silent if less than this share of its KL is information.
SILENT_SHARE: Final = 0.1
#: Of the place of a dimension.
_BAR_SHARE: Final = 0.7
_MAX_NUMBERS: Final = 16
#: Of more dimensions only the silent ones are told to those who do not see the bars.
_MAX_TOLD: Final = 16


@dataclass(frozen=True, slots=True)
class Dimension:
    """A latent dimension with its values in nats."""

    number: int
    kl: float
    information: float
    is_silent: bool  # it has a KL that is no information

    @property
    def label(self) -> str:
        values = f"KL {format_number(self.kl)}, information {format_number(self.information)}"
        return f"d{self.number}: {values}{', silent' * self.is_silent}"


def draw_bars(epoch: EpochMetrics, *, min_kl: float) -> Markup | None:
    """A bar for the KL of each dimension and one for its information, which is a part of it.

    `min_kl` is the KL of a collapsed dimension, of which nobody expects any information. None if
    the epoch lacks the information.
    """
    if epoch.val_information_per_dimension is None:
        return None
    dimensions = _pair(epoch, epoch.val_information_per_dimension, min_kl=min_kl)
    values = [value for each in dimensions for value in (each.kl, each.information)]
    scale = make_linear_scale(0, max([*values, min_kl]))
    bars = (_draw_dimension(each, scale=scale, total=len(dimensions)) for each in dimensions)
    return Markup(
        '<div class="chart" role="img" aria-label="{}"><svg class="values">{}</svg>'
        '<svg class="area">{}{}{}</svg></div>'
    ).format(
        _describe(dimensions, epoch=epoch.epoch),
        write_values(scale),
        draw_grid(scale),
        Markup("").join(bars),
        _number_dimensions(len(dimensions)),
    )


def _pair(epoch: EpochMetrics, information: Sequence[float], *, min_kl: float) -> list[Dimension]:
    return [
        Dimension(number, kl, known, is_silent=kl > min_kl and known < SILENT_SHARE * kl)
        for number, (kl, known) in enumerate(
            zip(epoch.val_kl_per_dimension, information, strict=False)
        )
    ]


def _draw_dimension(dimension: Dimension, *, scale: Scale, total: int) -> Markup:
    left = 100 * (dimension.number + (1 - _BAR_SHARE) / 2) / total
    parts = (
        '<g><title>{}</title><rect class="kl{}" x="{}%" width="{}%" y="{}" height="{}"/>'
        '<rect class="information" x="{}%" width="{}%" y="{}" height="{}"/></g>'
    )
    place = f"{left:.3f}", f"{100 * _BAR_SHARE / total:.3f}"
    return Markup(parts).format(
        dimension.label,
        " silent" * dimension.is_silent,
        *place,
        *_find_heights(dimension.kl, scale=scale),
        *place,
        *_find_heights(dimension.information, scale=scale),
    )


def _find_heights(value: float, *, scale: Scale) -> tuple[str, str]:
    """The top and the height of a bar."""
    height = HEIGHT * scale.place_one(value)
    return f"{HEIGHT - height:.1f}", f"{height:.1f}"


def _number_dimensions(total: int) -> Markup:
    shown = range(0, total, math.ceil(total / _MAX_NUMBERS))
    return Markup("").join(
        Markup('<text class="tick" x="{}%" y="{}" text-anchor="middle">{}</text>').format(
            f"{100 * (number + 0.5) / total:.2f}", HEIGHT + 18, number
        )
        for number in shown
    )


def _describe(dimensions: Sequence[Dimension], *, epoch: int) -> str:
    title = f"KL and information of each latent dimension after epoch {epoch}, in nats: "
    if len(dimensions) <= _MAX_TOLD:
        return title + "; ".join(each.label for each in dimensions)
    silent = [f"d{each.number}" for each in dimensions if each.is_silent]
    listed = f": {', '.join(silent[:_MAX_TOLD])}{' and more' * (len(silent) > _MAX_TOLD)}"
    return f"{title}{len(dimensions)} dimensions, {len(silent)} silent{listed if silent else ''}"
