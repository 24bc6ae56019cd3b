"""Histograms of scores against exact scores, in float64 and sorted."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score
from torch import Tensor

from worker.scores import Scores, ScoreSums, find_best_foreground

NUM_CELLS = 100_000
FOREGROUND_SHARE = 0.069


def draw_targets(*, colours: range = range(1, 10), seed: int = 0) -> Tensor:
    """Colours as in the corpus, (N,)."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(list(colours), NUM_CELLS)
    targets[rng.random(NUM_CELLS) > FOREGROUND_SHARE] = 0
    return torch.from_numpy(targets)


def draw_noise(*, seed: int = 1) -> Tensor:
    return torch.randn(10, NUM_CELLS, generator=torch.Generator().manual_seed(seed))


def one_hot(targets: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(targets, 10).T.float()


TARGETS = draw_targets()
NOISE = draw_noise()
#: A model that paints nothing: the background's logit is far above the others.
BIAS = torch.tensor([2.6] + [0.0] * 9).unsqueeze(1)
MODELS: dict[str, Tensor] = {
    "random": NOISE,
    "informative": 3 * one_hot(TARGETS) + NOISE + 2 * BIAS,
    "sharp": 40 * one_hot(TARGETS) + 20 * NOISE,
    "bf16": (3 * one_hot(TARGETS) + NOISE + 2 * BIAS).bfloat16().float(),
    "separated": 20 * one_hot(TARGETS) + NOISE,
    "varying by 1e-2": BIAS + 1e-2 * (one_hot(TARGETS) + NOISE),
    "varying by 1e-4": BIAS + 1e-4 * (one_hot(TARGETS) + NOISE),
    "varying by 1e-1, with outliers": BIAS
    + 1e-1 * (one_hot(TARGETS) + NOISE)
    + 100 * NOISE.roll(1, 1) * (NOISE.roll(2, 1)[:1] > 3.5),
    "of three values": NOISE.clamp(-1, 1).round(),
    "constant": BIAS.expand(10, NUM_CELLS),
}


def measure(logits: Tensor, targets: Tensor, *, batch: int = 15_000) -> Scores:
    sums = ScoreSums(device=torch.device("cpu"))
    for _ in range(2):
        sums.reset()
        for cells, colours in zip(logits.split(batch, 1), targets.split(batch), strict=True):
            sums.add(cells.contiguous(), targets=colours.unsqueeze(0))
    return sums.measure()


def score_exactly(logits: Tensor, colour: int) -> npt.NDArray[np.float64]:
    """The logit of p_c; of colour 0 that of 1 - p_0."""
    exact = logits.double().numpy()
    score = exact[colour] - logsumexp(np.delete(exact, colour, axis=0), axis=0)
    return score if colour else -score


@pytest.mark.parametrize("model", MODELS)
def test_average_precisions_are_those_of_exact_scores(model: str) -> None:
    logits = MODELS[model]
    measured = measure(logits, TARGETS).average_precisions
    for colour in range(10):
        is_own = (colour == TARGETS if colour else TARGETS > 0).numpy()
        expected = average_precision_score(is_own, score_exactly(logits, colour))
        assert measured[colour] == pytest.approx(expected, abs=3e-4), colour


def test_a_perfect_order_has_an_average_precision_of_one() -> None:
    assert measure(MODELS["separated"], TARGETS).average_precisions == [1.0] * 10


def test_a_model_that_knows_nothing_has_the_prevalence() -> None:
    scores = measure(MODELS["constant"], TARGETS)
    assert scores.average_precisions == pytest.approx(scores.prevalences, rel=1e-6)
    assert scores.prevalences[0] == (TARGETS > 0).double().mean().item()
    assert scores.prevalences[4] == (TARGETS == 4).double().mean().item()


def test_a_colour_that_does_not_occur_has_no_average_precision() -> None:
    targets = draw_targets(colours=range(1, 9))
    scores = measure(3 * one_hot(targets) + NOISE, targets)
    assert np.isnan(scores.average_precisions).tolist() == [False] * 9 + [True]
    assert scores.prevalences[9] == 0.0


def test_without_foreground_nothing_is_ranked_or_matched() -> None:
    scores = measure(NOISE, torch.zeros_like(TARGETS))
    assert np.isnan(scores.average_precisions).all()
    assert scores.match is None


@dataclass(frozen=True)
class Painted:
    """What argmax paints after a shift of the background's logit."""

    share: float
    recall: float
    precision: float
    iou: float
    accuracy: float


def paint(logits: Tensor, targets: Tensor, *, shift: float) -> Painted:
    shifted = logits.double()
    shifted[0] -= shift
    predicted = shifted.argmax(0)
    is_hit = (predicted == targets) & (targets > 0)
    return Painted(
        share=(predicted > 0).double().mean().item(),
        recall=(is_hit.sum() / (targets > 0).sum()).item(),
        precision=(is_hit.sum() / (predicted > 0).sum().clamp_min(1)).item(),
        iou=(is_hit.sum() / ((predicted > 0) | (targets > 0)).sum()).item(),
        accuracy=(predicted == targets).double().mean().item(),
    )


@pytest.mark.parametrize("model", MODELS)
def test_argmax_after_the_shift_gives_what_is_matched(model: str) -> None:
    match = measure(MODELS[model], TARGETS).match
    assert match is not None
    painted = paint(MODELS[model], TARGETS, shift=match.shift)
    assert match.recall == pytest.approx(painted.recall, abs=1e-4)
    assert match.precision == pytest.approx(painted.precision or None, abs=1e-4)
    assert match.iou == pytest.approx(painted.iou, abs=1e-4)
    assert match.accuracy == pytest.approx(painted.accuracy, abs=1e-4)


@pytest.mark.parametrize("model", ["random", "informative", "sharp", "varying by 1e-4"])
def test_the_matched_share_is_the_true_one_if_the_margins_differ(model: str) -> None:
    match = measure(MODELS[model], TARGETS).match
    assert match is not None
    truth = (TARGETS > 0).double().mean().item()
    painted = paint(MODELS[model], TARGETS, shift=match.shift)
    assert painted.share == pytest.approx(truth, abs=2e-4)


def test_a_model_that_paints_too_little_is_shifted_up_and_one_that_paints_too_much_down() -> None:
    informative = 3 * one_hot(TARGETS) + NOISE
    for bias, sign in ((10.0, 1), (-10.0, -1)):
        logits = informative.clone()
        logits[0] += bias
        match = measure(logits, TARGETS).match
        assert match is not None
        assert np.sign(match.shift) == sign


def test_of_two_shares_that_are_equally_near_the_smaller_is_painted() -> None:
    # Half of the cells are foreground, and all are one tie: none or all can be painted.
    targets = torch.tensor([0, 0, 1, 1])
    match = measure(torch.zeros(10, 4), targets).match
    assert match is not None
    assert (match.recall, match.precision, match.accuracy) == (0.0, None, 0.5)


def test_of_equal_foreground_logits_the_first_is_the_best_as_argmax_has_it() -> None:
    logits = NOISE.round()
    best, colours = find_best_foreground(logits)
    assert torch.equal(colours[0], logits[1:].argmax(0) + 1)
    assert torch.equal(best[0], logits[1:].amax(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_rows", [1, 10])
def test_logits_that_are_no_numbers_are_counted_without_an_error(
    value: float, num_rows: int
) -> None:
    logits = NOISE.clone()
    logits[:num_rows, 5::7] = value
    scores = measure(logits, TARGETS)
    assert len(scores.average_precisions) == 10


def test_scores_that_are_no_numbers_have_no_average_precision_and_no_match() -> None:
    logits = NOISE.clone()
    logits[:, 5] = torch.nan
    scores = measure(logits, TARGETS)
    assert np.isnan(scores.average_precisions).all()
    assert scores.match is None
