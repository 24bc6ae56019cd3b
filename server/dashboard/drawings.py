"""Drawings of studies as SVG: complete without a script, in the colours of the page.

A drawing is as wide as its place. So places along its width are percentages, its curves lie in an
inner picture that is stretched, and its text and marks keep their size. The style sheet has the
colours: the class of an arm is `line-0` to `line-6`, as in the charts of other pages.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from server.dashboard.scales import Scale, make_epoch_scale
from server.judging.numbers import format_number, format_share
from server.judging.thinning import Values

NUM_COLOURS: Final = 7
#: Height of the area of curves, and the size of the inner picture, in which places are integers.
HEIGHT: Final = 184
_SIZE: Final = 1000
_STRIP_HEIGHT: Final = 30
#: With more epochs, the marks of a median would overlap: it has one at its end.
_MAX_MARKED_EPOCHS: Final = 12
_FAILED: Final = ' class="failed"'

#: Marks of arms, around their middle, in the order of the markers in exported curves.
_ARM_MARKS: Final = (
    '<circle r="4"/>',
    '<path d="M-3.7-3.7h7.4v7.4h-7.4z"/>',
    '<path d="M0-4.8 4.8 3.7h-9.6z"/>',
    '<path d="M0-5 5 0 0 5-5 0z"/>',
    '<path d="M0 4.8 4.8-3.7h-9.6z"/>',
    '<path d="M-1.7-4.8h3.4v3.1h3.1v3.4h-3.1v3.1h-3.4v-3.1h-3.1v-3.4h3.1z"/>',
    '<path d="M-4.5-2.4-2.4-4.5 0-2.1 2.4-4.5 4.5-2.4 2.1 0 4.5 2.4 2.4 4.5 0 2.1-2.4 4.5-4.5 '
    '2.4-2.1 0z"/>',
)
#: Marks of seeds: of a judged one by its diagnosis, of another by its state.
SEED_MARKS: Final[dict[str, str]] = {
    "healthy": '<circle r="6"/>',
    "mode_collapse": '<path d="M-5.4-5.4h10.8v10.8h-10.8z"/>',
    "decision_collapse": '<path d="M-5.8-5.8h11.6v11.6h-11.6zM-2.6-2.6v5.2h5.2v-5.2z"/>',
    "posterior_collapse": '<path d="M0-6.6 6.4 5.2h-12.8z"/>',
    "under_informed": '<path d="M-6.8-3.4h13.6a6.8 6.8 0 0 1-13.6 0z"/>',
    "over_painted": '<path d="M0-7 7 0 0 7-7 0z"/>',
    "overfitted": '<path d="M-3.4-5.9h6.8L6.8 0 3.4 5.9h-6.8L-6.8 0z"/>',
    "out_of_range": '<path d="M0 6.6 6.4-5.2h-12.8z"/>',
    "unstable": '<path d="M-2.2-6.5h4.4v4.3h4.3v4.4h-4.3v4.3h-4.4v-4.3h-4.3v-4.4h4.3z"/>',
    "diverged": '<path d="M-6-3.2-3.2-6 0-2.8 3.2-6 6-3.2 2.8 0 6 3.2 3.2 6 0 2.8-3.2 6-6 3.2'
    '-2.8 0z"/>',
    "too_short": '<path d="M-6.5-2.4h13v4.8h-13z"/>',
    "unfinished": '<path d="M-5.2-6.2h10.4L0 0 5.2 6.2h-10.4L0 0z"/>',
    "undecided": '<circle r="5" fill="none" stroke="currentColor" stroke-width="2"/>',
    "running": '<circle r="5" fill="none" stroke="currentColor" stroke-width="2"/>'
    '<path d="M0-5a5 5 0 0 1 0 10z"/>',
    "paused": '<path d="M-4.5-5.5h3v11h-3zm6 0h3v11h-3z"/>',
    "waiting": '<circle r="2.5"/>',
    "missing": '<path d="M-5.5-5.5h11v11h-11z" fill="none" stroke="currentColor" '
    'stroke-width="1.5" stroke-dasharray="3 2.5"/>',
}


@dataclass(frozen=True, slots=True)
class Curves:
    """One metric of an arm by epoch: of each seed, and the median of the seeds."""

    arm: int
    epochs: npt.NDArray[np.int64]
    seeds: Values  # a row per seed; NaN where nothing is known
    median: Values


@dataclass(frozen=True, slots=True)
class Strip:
    """One metric of an arm: a value per seed, and whether the seed passed."""

    values: Sequence[float | None]
    labels: Sequence[str]
    has_passed: Sequence[bool]
    median: float | None


@dataclass(frozen=True, slots=True)
class Target:
    """What a metric is compared with: a band, or limits."""

    band: tuple[float, float] | None = None
    limits: tuple[float, ...] = ()


NO_TARGET: Final = Target()


def draw_symbols() -> Markup:
    """The marks that all other drawings of a page refer to."""
    arms = (f'<g id="arm-mark-{i}">{mark}</g>' for i, mark in enumerate(_ARM_MARKS))
    seeds = (f'<g id="seed-{name}">{mark}</g>' for name, mark in SEED_MARKS.items())
    body = "".join([*arms, *seeds])
    return Markup(f'<svg class="unseen" aria-hidden="true"><defs>{body}</defs></svg>')


def draw_seed(kind: str) -> Markup:
    """The mark of one seed."""
    return Markup(
        '<svg class="mark seed-{0}" viewBox="-8 -8 16 16" aria-hidden="true">'
        '<use href="#seed-{0}"/></svg>'
    ).format(kind)


def draw_key(arm: int) -> Markup:
    """A piece of an arm's curve, for the legend."""
    return Markup(
        '<svg class="key-line {}" width="30" height="12" aria-hidden="true">'
        '<path class="median" d="M1 6h28"/>{}</svg>'
    ).format(_style(arm), _draw_mark(arm, x="15", y=6))


def draw_interval(rate: float, low: float, high: float, *, name: str) -> Markup:
    """A pass rate with its interval, on an axis from 0 to 100 %."""
    label = f"pass rate of {name}: {format_share(rate)}, 95 % interval {format_share(low)} to "
    parts = (
        '<svg class="interval" role="img" aria-label="{}"><line class="axis" x1="0" x2="100%" '
        'y1="9" y2="9"/><line class="axis" x1="50%" x2="50%" y1="4" y2="14"/>'
        '<line class="span" x1="{}%" x2="{}%" y1="9" y2="9"/><circle cx="{}%" cy="9" r="4.5"/>'
        "</svg>"
    )
    shares = (f"{100 * value:.1f}" for value in (low, high, rate))
    return Markup(parts).format(label + format_share(high), *shares)


def draw_curves(
    curves: Sequence[Curves], *, scale: Scale, num_epochs: int, label: str, target: Target
) -> Markup:
    """Every seed thin and each arm's median thick, over the target."""
    epochs = make_epoch_scale(num_epochs)
    inner = Markup("").join(_draw_arm(each, scale=scale, epochs=epochs) for each in curves)
    marks = Markup("").join(_mark_median(each, scale=scale, epochs=epochs) for each in curves)
    return Markup(
        '<div class="chart" role="img" aria-label="{}"><svg class="values">{}</svg>'
        '<svg class="area">{}{}'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" width="100%" height="{}">{}</svg>'
        "{}</svg></div>"
    ).format(
        label,
        write_values(scale),
        draw_grid(scale, target=target),
        _write_epochs(epochs),
        _SIZE,
        _SIZE,
        HEIGHT,
        inner,
        marks,
    )


def draw_strip(strip: Strip, *, arm: int, scale: Scale, name: str, target: Target) -> Markup:
    """A point per seed; those that passed are filled, and the median is a bar."""
    known = [value for value in strip.values if value is not None]
    label = f"{name}: no value yet"
    if known:
        low, high, median = min(known), max(known), format_number(strip.median)
        span = f"{format_number(low)} to {format_number(high)}"
        label = f"{name}: median {median}, {span}, {len(known)} seeds"
    return Markup('<svg class="strip {}" role="img" aria-label="{}">{}{}{}</svg>').format(
        _style(arm),
        label,
        _draw_strip_grid(scale, target=target),
        _draw_points(strip, scale=scale),
        _draw_median(strip.median, scale=scale),
    )


def draw_strip_axis(scale: Scale) -> Markup:
    """The values under a column of strips."""
    return Markup('<svg class="strip-axis" aria-hidden="true">{}</svg>').format(
        Markup("").join(
            Markup('<text class="tick" x="{}%" y="12" text-anchor="{}">{}</text>').format(
                f"{100 * place:.2f}", _anchor(place), _format_tick(value)
            )
            for value, place in _place_ticks(scale)
        )
    )


def _style(arm: int) -> str:
    """The classes of an arm: further rounds of the colours have other dashes."""
    turn = arm // NUM_COLOURS
    return f"line-{arm % NUM_COLOURS}" + (f" dash-{min(turn, 2)}" if turn else "")


def _draw_mark(arm: int, *, x: str, y: float) -> Markup:
    """The mark of an arm; arms of one colour have different ones."""
    mark = (arm + arm // NUM_COLOURS) % len(_ARM_MARKS)
    return Markup('<use href="#arm-mark-{}" x="{}" y="{}"/>').format(mark, x, f"{y:g}")


def _draw_arm(curves: Curves, *, scale: Scale, epochs: Scale) -> Markup:
    xs = _to_integers(epochs.place(curves.epochs.astype(np.float64)))
    rows = np.vstack([curves.seeds, curves.median])
    heights = _to_integers(1 - scale.place(rows))
    lines = [
        _trace(xs, ys, known)
        for ys, known in zip(heights.tolist(), np.isfinite(rows).tolist(), strict=True)
    ]
    return Markup(
        '<g class="{}"><path class="runs" d="{}"/><path class="median" d="{}"/></g>'
    ).format(_style(curves.arm), "".join(lines[:-1]), lines[-1])


def _to_integers(shares: Values) -> npt.NDArray[np.int64]:
    return np.nan_to_num(_SIZE * shares).round().astype(np.int64)


def _trace(xs: Iterable[int], ys: Iterable[int], known: Iterable[bool]) -> str:
    """The line through the known values; a single one is a point."""
    points = [f"{x} {y}" for x, y, is_known in zip(xs, ys, known, strict=True) if is_known]
    return f"M{' '.join(points)}{'h0' * (len(points) == 1)}" if points else ""


def _mark_median(curves: Curves, *, scale: Scale, epochs: Scale) -> Markup:
    known = np.flatnonzero(np.isfinite(curves.median))
    shown = known if len(curves.epochs) <= _MAX_MARKED_EPOCHS else known[-1:]
    xs = 100 * epochs.place(curves.epochs[shown].astype(np.float64))
    ys = HEIGHT * (1 - scale.place(curves.median[shown]))
    marks = (
        _draw_mark(curves.arm, x=f"{x:.2f}%", y=round(float(y), 1))
        for x, y in zip(xs, ys, strict=True)
    )
    return Markup('<g class="{}">{}</g>').format(_style(curves.arm), Markup("").join(marks))


def draw_grid(scale: Scale, *, target: Target = NO_TARGET) -> Markup:
    """The lines behind curves or bars, and the target before them."""
    lines = [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_height_of(place))
        for _, place in _place_ticks(scale)
    ]
    if target.band:
        low, high = (_height_of(scale.place_one(value)) for value in target.band)
        lines.append(
            Markup('<rect class="band" x="0" width="100%" y="{}" height="{}"/>').format(
                high, f"{float(low) - float(high):.1f}"
            )
        )
    lines += [
        Markup('<line class="limit" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(
            _height_of(scale.place_one(limit))
        )
        for limit in target.limits
    ]
    return Markup("").join(lines)


def _height_of(place: float) -> str:
    return f"{HEIGHT * (1 - place):.1f}"


def write_values(scale: Scale) -> Markup:
    """The values beside the area of curves or bars."""
    return Markup("").join(
        Markup('<text class="tick" x="100%" y="{}" text-anchor="end">{}</text>').format(
            f"{HEIGHT * (1 - place) + 4:.1f}", _format_tick(value)
        )
        for value, place in _place_ticks(scale)
    )


def _write_epochs(epochs: Scale) -> Markup:
    return Markup("").join(
        Markup('<text class="tick" x="{}%" y="{}" text-anchor="middle">{}</text>').format(
            f"{100 * place:.2f}", HEIGHT + 18, _format_tick(value)
        )
        for value, place in _place_ticks(epochs)
    )


def _draw_strip_grid(scale: Scale, *, target: Target) -> Markup:
    lines = [
        Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(
            f"{100 * place:.2f}"
        )
        for _, place in _place_ticks(scale)
    ]
    if target.band:
        low, high = (100 * scale.place_one(value) for value in target.band)
        lines.append(
            Markup('<rect class="band" x="{}%" width="{}%" y="0" height="100%"/>').format(
                f"{low:.2f}", f"{high - low:.2f}"
            )
        )
    lines += [
        Markup('<line class="limit" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(
            f"{100 * scale.place_one(limit):.2f}"
        )
        for limit in target.limits
    ]
    return Markup("").join(lines)


def _draw_points(strip: Strip, *, scale: Scale) -> Markup:
    """Points at different heights, so that equal values can be told apart."""
    places = 100 * scale.place(np.array(strip.values, np.float64))
    rows = zip(places.tolist(), strip.labels, strip.has_passed, strict=True)
    # Thousands of points: a template for each would take most of the page's time.
    points = [
        f'<circle{"" if has_passed else _FAILED} cx="{x:.2f}%" '
        f'cy="{_STRIP_HEIGHT // 2 + 3 * (number * 3 % 5 - 2)}" r="3.5">'
        f"<title>{escape(label)}</title></circle>"
        for number, (x, label, has_passed) in enumerate(rows)
        if x == x
    ]
    return Markup("".join(points))


def _draw_median(median: float | None, *, scale: Scale) -> Markup:
    if median is None:
        return Markup("")
    return Markup('<line class="middle" x1="{0}%" x2="{0}%" y1="2" y2="{1}"/>').format(
        f"{100 * scale.place_one(median):.2f}", _STRIP_HEIGHT - 2
    )


def _place_ticks(scale: Scale) -> Iterable[tuple[float, float]]:
    places = scale.place(np.array(scale.ticks))
    return zip(scale.ticks, places.tolist(), strict=True)


def _format_tick(value: float) -> str:
    return f"{value:g}"


def _anchor(place: float) -> str:
    return "start" if place < 0.01 else "end" if place > 0.99 else "middle"
