"""KL and information per dimension as bars."""

import re

from artificial_runs import make_epoch
from known_measures import make_known

from server.dashboard.bars import draw_bars


def find_bars(svg: str, name: str) -> list[float]:
    return [float(height) for height in re.findall(rf'class="{name}"[^>]*height="([^"]+)"', svg)]


def test_dimension_with_kl_and_without_information_is_marked() -> None:
    epoch = make_known(
        val_kl_per_dimension=[2.0, 2.0, 0.04, 0.2],
        val_information_per_dimension=[1.5, 0.1, 0.0, 0.1],
    )
    svg = str(draw_bars(epoch, min_kl=0.05))
    assert find_bars(svg, "kl silent") == [184.0]
    assert find_bars(svg, "kl") == [184.0, 3.7, 18.4]
    assert find_bars(svg, "information") == [138.0, 9.2, 0.0, 9.2]
    assert "d1: KL 2, information 0.1, silent; d2: KL 0.04, information 0; d3" in svg


def test_many_dimensions_are_told_by_those_that_are_silent() -> None:
    information = [1.0] * 256
    information[7] = 0.0
    epoch = make_known(val_kl_per_dimension=[1.0] * 256, val_information_per_dimension=information)
    svg = str(draw_bars(epoch, min_kl=0.05))
    assert len(find_bars(svg, "information")) == 256
    assert 'after epoch 1, in nats: 256 dimensions, 1 silent: d7"' in svg
    assert len(re.findall("<text", svg)) < 25


def test_estimate_below_nothing_has_no_bar() -> None:
    epoch = make_known(val_kl_per_dimension=[0.0], val_information_per_dimension=[-0.01])
    assert find_bars(str(draw_bars(epoch, min_kl=0.05)), "information") == [0.0]


def test_epoch_without_the_information_has_no_bars() -> None:
    assert draw_bars(make_epoch(), min_kl=0.05) is None
