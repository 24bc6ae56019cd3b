"""The methods paragraph of a study: how it was made and judged, as a text for a paper."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from server.judging.criteria import CriteriaSet, Thresholds, read_thresholds
from server.judging.decisions import ERROR, join_names
from server.judging.facts import JobFacts
from server.judging.knowledge import METHOD, MeasureTable
from server.judging.knowledge import SOURCES as MEASURE_SOURCES
from server.judging.studies import ArmVerdict, StudyVerdict
from server.judging.verdicts import judge
from server.models.configuration import NOT_IDENTITY, BuiltInDataset, count_steps, read_config
from server.models.provenance import Provenance
from server.models.studies import Study
from server.models.tables import Job

#: The smallest pass rate that the lower end of a recommended arm's interval must have: the default
#: of `decide_in_looks`.
MIN_PASS_RATE: Final = 0.5
#: Those of what every study has.
SOURCES: Final = (
    "R. D. Boschloo, Raised conditional level of significance for the 2x2-table when testing the "
    "equality of two probabilities, Statistica Neerlandica 24 (1970), 1-9.",
    "E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal "
    "of the American Statistical Association 22 (1927), 209-212.",
    "B. Efron, Better bootstrap confidence intervals, Journal of the American Statistical "
    "Association 82 (1987), 171-185.",
    "D. P. Kingma and M. Welling, Auto-encoding variational Bayes, ICLR (2014).",
    "I. Higgins et al., beta-VAE: learning basic visual concepts with a constrained variational "
    "framework, ICLR (2017).",
)
_NO_DIGITS: Final = "not known yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """Everything that the paragraph is about."""

    study: Study
    verdict: StudyVerdict
    thresholds: Thresholds
    facts: Mapping[str, JobFacts]

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [each.summary for each in self.facts.values() if each.summary]

    @property
    def num_arms(self) -> int:
        return len(self.verdict.arms)

    @property
    def by_evidence(self) -> bool:
        return self.verdict.criteria_set is CriteriaSet.evidence

    @property
    def has_measures(self) -> bool:
        """Whether the report is about measures of what a model knows: its criteria ask for them, or
        any run has them; old runs have not."""
        return self.by_evidence or MeasureTable.of_arms(self.verdict.arms).has_measures


def describe_methods(methods: Methods) -> list[str]:
    """One text for each part: data, arms, training, criteria, decision, missing seeds, version.

    They are plain text, not Markdown or HTML.
    """
    parts: list[Callable[[Methods], str]] = [
        _describe_data,
        _describe_arms,
        _describe_training,
        _describe_criteria,
        _describe_measures,
        _describe_decision,
        _describe_looks,
        _describe_missing,
        _describe_differences,
        _describe_version,
    ]
    return [text for part in parts if (text := part(methods))]


def list_sources(methods: Methods) -> list[str]:
    """The papers that the texts name."""
    return [*SOURCES, *(MEASURE_SOURCES if methods.has_measures else ())]


# -- data and training


def _describe_data(methods: Methods) -> str:
    names = _list_values(methods, "dataset")
    is_generated = set(names) == {BuiltInDataset.atomic}
    origin = "Its grids are generated" if is_generated else "Data without a split is divided"
    return (
        f"The data set is {_join(names)}{_describe_sizes(methods)}. {origin} with "
        f"{_describe_data_seed(methods)}. {describe_overlap(methods.summaries)}"
        f"{_describe_hashes(methods)}"
    )


def _describe_sizes(methods: Methods) -> str:
    """The splits and the background, once a job has read the data."""
    sizes = _unique(
        f"{_count(s['num_train'])} grids for training, {_count(s['num_val'])} for validation and "
        f"{_count(s['num_test'])} for testing, of {s['grid_size']} x {s['grid_size']} cells, "
        f"{s['background_share']:.1%} of them background"
        for s in methods.summaries
        if {"num_train", "num_val", "num_test", "grid_size", "background_share"} <= s.keys()
    )
    if not sizes:
        numbers = [each for each in _list_values(methods, "num_samples") if each != str(None)]
        return f", at most {_join(numbers)} grids" if numbers else ""
    if len(sizes) > 1:
        return f"; {len(sizes)} data sets of different sizes or shares, such as {sizes[0]}"
    return f", {sizes[0]}"


def _describe_data_seed(methods: Methods) -> str:
    seeds = sorted({each.data_seed for each in methods.facts.values()})
    own = methods.study.data_seed
    if own is None:
        return "the seed of the run, so that each seed has data of its own"
    if seeds in ([], [own]):
        return f"data seed {own}, the same for all runs"
    return f"data seed {own}, except in runs that were trained before the study"


def describe_overlap(summaries: Sequence[Mapping[str, Any]]) -> str:
    """How many grids of the other splits occur in training: the most that a run has."""
    known = [
        summary
        for summary in summaries
        if {"num_val", "num_test"} <= summary.keys()
        and {"val", "test"} <= summary.get("overlap", {}).keys()
    ]
    if not known:
        return ""
    most = {
        split: max(known, key=lambda each: each["overlap"][split]["by_orbit"])
        for split in ("val", "test")
    }
    found = [
        f"{_count(number)} of {_count(summary[f'num_{split}'])} "
        f"{'validation' if split == 'val' else 'test'} grids"
        for split, summary in most.items()
        if (number := summary["overlap"][split]["by_orbit"])
    ]
    if not found:
        return "No validation or test grid occurs in training, not even turned or reflected. "
    return f"Up to {_join(found, 'and')} occur in training too, some turned or reflected. "


def _describe_hashes(methods: Methods) -> str:
    hashes = _unique(s["sha256"] for s in methods.summaries if "sha256" in s)
    if len(hashes) == 1:
        return f"SHA-256 of the grids: {hashes[0]}."
    known = f"{len(hashes)} different ones; jobs.csv has the data seed of each run"
    return f"SHA-256 of the grids: {known if hashes else _NO_DIGITS}."


def _describe_arms(methods: Methods) -> str:
    study, arms = methods.study, methods.verdict.arms
    race = (
        " It was a race: an arm that was ruled out got no further seeds."
        if study.until_decided
        else ""
    )
    identities = "; ".join(f"{arm.arm}: {arm.config_sha256}" for arm in arms)
    return (
        f"{_plural(len(arms), 'arm')} (one configuration each, all but the seed) with "
        f"{_plural(len(study.seeds), 'seed')}: {_list_seeds(study.seeds)}.{race} "
        f"SHA-256 of each arm's configuration: {identities}."
    )


def _list_seeds(seeds: Sequence[int]) -> str:
    """`0 to 9`, or each of them if they do not follow each other."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _describe_training(methods: Methods) -> str:
    def say(key: str) -> str:
        return _join(_list_values(methods, key))

    varied = list_varied(methods.verdict.arms)
    differ = f" The arms differ in {join_names(varied)}." if varied else ""
    augmented = _list_values(methods, "augment") == ["true"]
    symmetries = " Each training grid is rotated or reflected at random." if augmented else ""
    return (
        f"Each run trains a convolutional β-VAE (Kingma and Welling, 2014; Higgins et al., 2017) "
        f"with {say('latent_dim')} latent dimensions for {say('epochs')} epochs"
        f"{_describe_steps(methods)}, in batches of {say('batch_size')}, by Adam with a learning "
        f"rate that falls from {say('learning_rate')} to {say('min_learning_rate')} as a cosine."
        f"{symmetries}{differ}"
    )


def _describe_steps(methods: Methods) -> str:
    steps: list[str] = []
    for arm, results in zip(methods.verdict.arms, methods.verdict.results, strict=True):
        jobs = (methods.facts.get(result.job_id or "") for result in results)
        config = read_config(arm.config)
        for facts in jobs:
            num_train = facts.summary.get("num_train") if facts else None
            if num_train:
                number = count_steps(num_train, epochs=config.epochs, batch_size=config.batch_size)
                steps.append(_count(number))
    found = _unique(steps)
    return f" ({_join(found)} steps)" if found else ""


def list_varied(arms: Sequence[ArmVerdict]) -> list[str]:
    """The settings in which the arms differ."""
    keys = dict.fromkeys(key for arm in arms for key in arm.config)
    return [
        key
        for key in keys
        if key not in NOT_IDENTITY and len(_unique(repr(arm.config.get(key)) for arm in arms)) > 1
    ]


# -- criteria and decision


def _describe_criteria(methods: Methods) -> str:
    """Each criterion with its target, as verdicts show it."""
    targets: dict[str, list[str]] = {}
    for arm in methods.verdict.arms:
        job = Job(option=arm.option, config=arm.config)
        verdict = judge(job, [], methods.thresholds, criteria_set=methods.verdict.criteria_set)
        for criterion in verdict.criteria:
            targets.setdefault(criterion.name, []).append(criterion.target)
    rules = "; ".join(f"{name} ({_join(_unique(each))})" for name, each in targets.items())
    criteria_set = methods.verdict.criteria_set
    return (
        f"A seed passes if its run meets every criterion of the set {criteria_set}: {rules}."
        f"{_describe_changes(methods)}"
    )


def _describe_changes(methods: Methods) -> str:
    """What a query put in place of the study's own criteria and thresholds."""
    own = read_thresholds(methods.study.thresholds)
    is_own_set = methods.verdict.criteria_set == methods.study.criteria
    changed = [
        *(["thresholds"] if methods.thresholds != own else []),
        *([] if is_own_set else ["criteria"]),
    ]
    return f" These {join_names(changed)} are not those of the study itself." if changed else ""


def _describe_measures(methods: Methods) -> str:
    if not methods.has_measures:
        return ""
    return METHOD if methods.by_evidence else f"{METHOD} By these criteria they decide nothing."


def _describe_decision(methods: Methods) -> str:
    recommended = (
        f"An arm is recommended if it is the only one left, and the lower end of the 95% "
        f"interval of its pass rate (Wilson, 1927) is at least {MIN_PASS_RATE:g}."
    )
    if methods.num_arms == 1:
        return f"There is no other arm to compare with. {recommended}"
    num_looks, num_others = methods.study.num_planned_looks, methods.num_arms - 1
    level = ERROR / (num_looks * num_others)
    return (
        "Only the numbers of passed seeds decide. At each look an arm is ruled out if another arm "
        "passes more often by Boschloo's exact test (Boschloo, 1970), one-sided, with p of at most "
        f"{ERROR:g} / ({_plural(num_looks, 'planned look')} x {_plural(num_others, 'other arm')}) "
        f"= {level:.3g}. By the union bound, the chance that the best arm is ruled out is at most "
        f"{ERROR:.0%}, over all planned looks and whatever the true pass rates are. {recommended}"
    )


def _describe_looks(methods: Methods) -> str:
    study, taken, late = methods.study, methods.verdict.looks, methods.verdict.late_looks
    planned = study.looks[: study.num_planned_looks]
    text = (
        f"Looks were planned after {_join(map(str, planned), 'and')} seeds of each arm; "
        f"{len(taken) - len(late)} of {len(planned)} took place."
    )
    if late:
        text += (
            f" Seeds were added later, with looks after {_join(map(str, late), 'and')} seeds: the "
            "stated error holds for the planned looks only."
        )
    if methods.verdict.is_cut_short:
        text += (
            " The study was cancelled before its last look was due, so the stated error does not "
            "hold for that one."
        )
    return text


def _describe_missing(methods: Methods) -> str:
    missing = {arm.arm: arm.num_missing for arm in methods.verdict.arms if arm.num_missing}
    waiting = sum(not each.has_ended for results in methods.verdict.results for each in results)
    reused = sum(each.is_reused for results in methods.verdict.results for each in results)
    text = "A run whose loss diverged counts as not passed. "
    if missing:
        listed = join_names([f"{number} of {arm}" for arm, number in missing.items()])
        text += f"Missing, because the run was lost, cancelled or deleted: {listed}."
    else:
        text += "No run is missing."
    undecided = {arm.arm: arm.num_undecided for arm in methods.verdict.arms if arm.num_undecided}
    if undecided:
        listed = join_names([f"{number} of {arm}" for arm, number in undecided.items()])
        text += f" Not judged, because a criterion had no data: {listed}."
    if waiting:
        text += f" {_plural(waiting, 'run')} had not ended."
    if reused:
        text += f" {_plural(reused, 'run')} had been trained before the study."
    return text


def _describe_differences(methods: Methods) -> str:
    if methods.num_arms == 1:
        return ""
    return (
        "Differences of other metrics between arms are medians over the seeds that both arms have, "
        "with a 95% interval by the bootstrap (BCa, Efron, 1987), from five seeds on. They decide "
        "nothing."
    )


def _describe_version(methods: Methods) -> str:
    known = [each.provenance for each in methods.facts.values() if each.provenance]
    programs = _unique(map(_describe_program, known))
    devices = _unique(each.device for each in methods.facts.values() if each.device)
    trained = f"Trained with {_join(programs)}" if programs else "Trained"
    text = f"{trained} on {join_names(devices)}. " if devices else ""
    num_unknown = sum(each.device is not None for each in methods.facts.values()) - len(known)
    if num_unknown:
        text += f"The versions were not recorded for {_plural(num_unknown, 'run')}. "
    return f"{text}Report made with Losslab {version('losslab')}; study {methods.study.id}."


def _describe_program(made_by: Provenance) -> str:
    cuda = f", CUDA {made_by.cuda_version}" if made_by.cuda_version else ""
    return (
        f"{made_by.describe_source()}, PyTorch {made_by.torch_version}{cuda}, "
        f"NumPy {made_by.numpy_version} and Python {made_by.python_version}, in "
        f"{made_by.number_format}"
    )


# -- words


def _list_values(methods: Methods, key: str) -> list[str]:
    """The different values of a setting, in the order of the arms."""
    return _unique(_show(arm.config.get(key)) for arm in methods.verdict.arms)


def _show(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return _count(value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _join(values: Iterable[str], word: str = "or") -> str:
    """`0.5, 1 or 2`."""
    listed: Sequence[str] = list(values)
    return f" {word} ".join([*([", ".join(listed[:-1])] if listed[:-1] else []), *listed[-1:]])


def _count(number: int) -> str:
    return f"{number:,}"


def _plural(number: int, noun: str) -> str:
    return f"{_count(number)} {noun}{'s' * (number != 1)}"
