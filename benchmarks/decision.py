"""How often the decision between arms is wrong, and how many runs a race saves.

Draws studies in which each arm passes a seed by a known chance, and has the product decide them
after 5, 10, 20 and 40 seeds. Three questions: how often the best of equal arms is ruled out, which
may be 5 % at most; how often a race finds the best arm, and after how many runs; and how often the
interval of a median difference holds the true one. Prints the tables, writes
`results/decision.json` and puts the tables into `docs/deciding.md`:

    python -m benchmarks.decision
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.judging.intervals import paired_difference
from server.judging.statistics import (
    PLANNED_LOOKS,
    SequentialDecision,
    decide_in_looks,
)

PAGE = REPOSITORY / "docs" / "deciding.md"
PACKAGES = ("losslab", "scipy", "numpy")
NUM_SEEDS = PLANNED_LOOKS[-1]
#: The largest share of studies in which the best arm may be ruled out.
MAX_ERROR = 0.05

NUM_ARMS = (2, 3, 6, 10)
CHANCES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
RACES: tuple[tuple[float, ...], ...] = (
    (0.9, 0.1, 0.0),
    (0.9, 0.5),
    (0.9, 0.5, 0.1),
    (0.9, 0.6, 0.6, 0.6),
    (1.0, 0.975, 0.0, 0.0),
    (1.0, *[0.0] * 9),
    (0.7, 0.3),
    (0.5, 0.0),
)
NUM_PAIRS = (5, 10, 20, 40)

Results = dict[str, list[bool]]
Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    num_studies, generator = arguments.num_studies, random.Random(arguments.seed)
    rows = {
        "errors": [
            measure_error(num_arms, chance, share, num_studies=num_studies, generator=generator)
            for share in (0.0, 0.5)
            for num_arms in NUM_ARMS
            for chance in CHANCES
        ],
        "uncorrected": [
            measure_error(
                2, chance, 0.0, num_planned_looks=1, num_studies=num_studies, generator=generator
            )
            for chance in CHANCES
        ],
        "races": [measure_race(race, num_studies, generator) for race in RACES],
        "intervals": [measure_interval(pairs, num_studies, generator) for pairs in NUM_PAIRS],
    }
    tables = format_tables(rows)
    print("\n\n".join(tables.values()))
    if arguments.no_write:
        return
    write_results("decision", machine | {"num_studies": num_studies, "seed": arguments.seed} | rows)
    for name, table in tables.items():
        show(table, name=name, page=PAGE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-studies", type=int, default=2000, help="studies of each setting")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn studies")
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    return parser.parse_args()


def draw(chances: Sequence[float], generator: random.Random, *, share: float = 0.0) -> Results:
    """Whether each seed of each arm passes; a `share` of the seeds is equally hard for all arms."""
    results: Results = {f"arm {number}": [] for number in range(len(chances))}
    for _ in range(NUM_SEEDS):
        common = generator.random() if generator.random() < share else None
        for seeds, chance in zip(results.values(), chances, strict=True):
            seeds.append((generator.random() if common is None else common) < chance)
    return results


# -- the error


def measure_error(
    num_arms: int,
    chance: float,
    share: float,
    *,
    num_planned_looks: int = len(PLANNED_LOOKS),
    num_studies: int,
    generator: random.Random,
) -> Row:
    """How often one of equal arms is ruled out; each of them is as good as the best.

    With one planned look there are four all the same, without the correction for their number.
    """
    num_out = []
    for _ in range(num_studies):
        results = draw([chance] * num_arms, generator, share=share)
        sequence = decide_in_looks(
            results, looks=PLANNED_LOOKS, num_planned_looks=num_planned_looks
        )
        num_out.append(len(sequence.decision.ruled_out))
    return {
        "num_arms": num_arms,
        "chance": chance,
        "share_of_common_seeds": share,
        "num_planned_looks": num_planned_looks,
        "best_ruled_out": sum(num_out) / (num_studies * num_arms),
        "any_ruled_out": sum(map(bool, num_out)) / num_studies,
    }


# -- races


def measure_race(chances: Sequence[float], num_studies: int, generator: random.Random) -> Row:
    """What a race between these arms ends with; the first arm is the best."""
    states: Counter[str] = Counter()
    num_kept = num_best_kept = num_runs = 0
    for _ in range(num_studies):
        race = decide_in_looks(draw(chances, generator), looks=PLANNED_LOOKS, is_race=True)
        states[race.decision.state] += 1
        num_kept += len(race.decision.kept)
        num_best_kept += "arm 0" in race.decision.kept
        num_runs += count_runs(race)
    return {
        "chances": list(chances),
        "states": {state: count / num_studies for state, count in sorted(states.items())},
        "best_kept": num_best_kept / num_studies,
        "mean_kept": num_kept / num_studies,
        "mean_runs": num_runs / num_studies,
        "runs_without_race": NUM_SEEDS * len(chances),
    }


def count_runs(race: SequentialDecision) -> int:
    """Each arm ran up to the look that ruled it out, or up to the last."""
    num_seeds = race.looks[-1].num_seeds
    ruled_out = sum(entry.num_seeds for entry in race.decision.ruled_out)
    return ruled_out + num_seeds * len(race.decision.kept)


# -- intervals of a median difference


def measure_interval(num_pairs: int, num_studies: int, generator: random.Random) -> Row:
    """How often the interval holds the median of normal differences, which is 0."""
    num_held, widths = 0, []
    for _ in range(num_studies):
        found = paired_difference(
            [generator.gauss(0, 1) for _ in range(num_pairs)], [0.0] * num_pairs
        )
        assert found is not None
        num_held += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    return {
        "num_pairs": num_pairs,
        "coverage": num_held / num_studies,
        "mean_width": sum(widths) / num_studies,
    }


# -- results


def format_tables(rows: dict[str, list[Row]]) -> dict[str, str]:
    """The tables by the marks that they stand between."""
    independent = [row for row in rows["errors"] if not row["share_of_common_seeds"]]
    common = [row for row in rows["errors"] if row["share_of_common_seeds"]]
    return {
        "errors": format_errors(independent),
        "common": format_errors(common),
        "uncorrected": format_errors(rows["uncorrected"]),
        "races": format_races(rows["races"]),
        "intervals": format_intervals(rows["intervals"]),
    }


def format_errors(rows: list[Row]) -> str:
    chances = list(dict.fromkeys(row["chance"] for row in rows))
    lines = [
        f"| equal arms | {' | '.join(f'chance {chance:g}' for chance in chances)} "
        "| any arm ruled out, at most |",
        "| --- |" + " --- |" * (len(chances) + 1),
    ]
    for num_arms in dict.fromkeys(row["num_arms"] for row in rows):
        group = [row for row in rows if row["num_arms"] == num_arms]
        shares = " | ".join(f"{row['best_ruled_out']:.1%}" for row in group)
        most = max(row["any_ruled_out"] for row in group)
        lines.append(f"| {num_arms} | {shares} | {most:.1%} |")
    return "\n".join(lines)


def format_races(rows: list[Row]) -> str:
    lines = [
        "| chances to pass | decided | narrowed | undecided | best arm kept | arms kept, mean "
        "| runs, mean | runs without a race |",
        "| --- |" + " --- |" * 7,
    ]
    for row in rows:
        states = [row["states"].get(state, 0.0) for state in ("decided", "narrowed", "undecided")]
        shares = " | ".join(f"{state:.1%}" for state in states)
        lines.append(
            f"| {format_chances(row['chances'])} | {shares} "
            f"| {row['best_kept']:.1%} | {row['mean_kept']:.2f} | {row['mean_runs']:.0f} "
            f"| {row['runs_without_race']} |"
        )
    return "\n".join(lines)


def format_chances(chances: Sequence[float]) -> str:
    """`0.9, 0.5`, and `1, nine of 0` shortened to `1, 9 x 0`."""
    counts = Counter(chances)
    return ", ".join(
        f"{count} x {chance:g}" if count > 1 else f"{chance:g}" for chance, count in counts.items()
    )


def format_intervals(rows: list[Row]) -> str:
    lines = ["| pairs | interval holds the true median | mean width |", "| --- | --- | --- |"]
    lines += [
        f"| {row['num_pairs']} | {row['coverage']:.1%} | {row['mean_width']:.2f} |" for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
