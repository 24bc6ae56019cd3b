"""Grids per second of training: Losslab, the plain PyTorch loop, and pythae's BaseTrainer.

Each runs in its own process. They take turns, so that the machine's state is the same for all, and
the ratios are medians over the rounds. The roofline is the speed if a step's arithmetic ran at the
rate of a large matrix product. Prints a table and writes `results/training.json`. It takes about
four minutes on two cores:

    python -m benchmarks.training --workers 1,2

pythae is not a dependency: `pip install --no-deps pythae tqdm imageio dill cloudpickle`.

The gain by parts of the trainer, compared with the trainer without them:

    python -m benchmarks.training --results parts \\
        --names losslab,plain_convolutions,memory_given_back
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import BATCH_SIZE, compute_plain_loss, make_plain_model
from benchmarks.machine import REPOSITORY, describe_machine, write_results
from server.environment.cores import count_cores
from worker.device import choose_device, choose_dtype

PYTHAE_HINT = (
    "pythae is not installed and is left out: "
    "pip install --no-deps pythae tqdm imageio dill cloudpickle"
)
PACKAGES = ("losslab", "torch", "numpy", "pythae")
#: Size of the square matrices, and the number of products per timing, so that the launch of a
#: kernel on a GPU does not count.
MATMUL_SIZES = {"cpu": (2048, 1), "cuda": (8192, 10)}


@dataclass(frozen=True, slots=True)
class Runner:
    """A contestant's process."""

    name: str
    process: subprocess.Popen[str]

    def start_round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def read_answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early; see its output above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    results: dict[str, Any] = machine | {"devices": []}
    for name in arguments.devices:
        measured = measure_device(torch.device(name), arguments=arguments)
        results["devices"].append(measured)
        print(format_device(measured))
    if not arguments.no_write:
        write_results(arguments.results, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--grids", type=int, default=6_400, help="per round on the CPU")
    parser.add_argument("--gpu-grids", type=int, default=80_000, help="per round on a GPU")
    parser.add_argument(
        "--workers",
        type=lambda given: [int(number) for number in given.split(",")],
        default=[],
        help="also measure these numbers of workers on one device, such as 1,2,4,8",
    )
    parser.add_argument(
        "--names",
        type=lambda given: given.split(","),
        default=["losslab", "plain", "pythae"],
        help="the contestants; the first one is compared with the others",
    )
    parser.add_argument(
        "--devices",
        type=lambda given: given.split(","),
        default=[choose_device().type],
        help="such as cpu,cuda; the GPU alone if there is one",
    )
    parser.add_argument("--results", default="training", help="name of the file in results/")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def measure_device(device: torch.device, *, arguments: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in arguments.names if name != "pythae" or find_spec("pythae")]
    if names != arguments.names:
        print(PYTHAE_HINT)
    num_grids = arguments.grids if device.type == "cpu" else arguments.gpu_grids
    rates, first = race(names, device=device, rounds=arguments.rounds, num_grids=num_grids)
    roofline = measure_roofline(device)
    losslab = statistics.median(rates[names[0]])
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": count_cores(),
        "grids_a_round": num_grids,
        "rounds": arguments.rounds,
        "grids_per_second": {name: round(statistics.median(r)) for name, r in rates.items()},
        "losslab_times_as_fast_as": {
            name: round(compute_ratio(rates[names[0]], rates[name]), 2) for name in names[1:]
        },
        # Includes what is created once: threads, memory, on a GPU the graphs.
        "first_round_seconds": first,
        "rates": {name: [round(rate) for rate in found] for name, found in rates.items()},
        "roofline": roofline | {"losslab_share": round(losslab / roofline["grids_per_second"], 3)},
        "workers": measure_workers(device, arguments=arguments, num_grids=num_grids),
    }


def compute_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of each round, whose contestants ran right after each other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def race(
    names: list[str], *, device: torch.device, rounds: int, num_grids: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Grids per second of each contestant in each round, and the seconds of its first round."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        runners = [
            stack.enter_context(
                start(name, device=device, num_threads=count_cores(), num_grids=num_grids)
            )
            for name in names
        ]
        first = {each.name: round(each.read_answer()["first_seconds"], 3) for each in runners}
        for _ in range(rounds):
            for runner in runners:
                runner.start_round()
                answer = runner.read_answer()
                rates[runner.name].append(answer["grids"] / answer["seconds"])
    return rates, first


def start(name: str, *, device: torch.device, num_threads: int, num_grids: int) -> Runner:
    command = [sys.executable, "-m", "benchmarks.contestants", name, device.type]
    process = subprocess.Popen(
        [*command, str(num_threads), str(num_grids)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Runner(name, process)


def measure_workers(
    device: torch.device, *, arguments: argparse.Namespace, num_grids: int
) -> dict[int, dict[str, float]]:
    """Grids per second of several workers together, which share the device and the cores."""
    settings = arguments.workers
    rates: dict[int, list[float]] = {number: [] for number in settings}
    with ExitStack() as stack:
        teams = {
            number: [
                stack.enter_context(
                    start(
                        "losslab",
                        device=device,
                        num_threads=max(1, count_cores() // number),
                        num_grids=num_grids,
                    )
                )
                for _ in range(number)
            ]
            for number in settings
        }
        for runner in (runner for team in teams.values() for runner in team):
            runner.read_answer()
        for _ in range(arguments.rounds):
            for number, team in teams.items():
                rates[number].append(run_together(team))
    return {
        number: {
            "grids_per_second": round(statistics.median(found)),
            "times_the_first": round(compute_ratio(found, rates[settings[0]]), 2),
        }
        for number, found in rates.items()
    }


def run_together(team: list[Runner]) -> float:
    started = time.perf_counter()
    for runner in team:
        runner.start_round()
    grids = sum(runner.read_answer()["grids"] for runner in team)
    return grids / (time.perf_counter() - started)


def measure_roofline(device: torch.device) -> dict[str, Any]:
    """Grids per second if a step's arithmetic ran at the rate of a large matrix product."""
    flops = count_step_flops()
    dtype = choose_dtype(device)
    rate = measure_matmul_rate(device, dtype=dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_gflop_per_second": round(rate / 1e9, 1),
        "step_gflop": round(flops / 1e9, 2),
        "grids_per_second": round(BATCH_SIZE * rate / flops),
    }


def count_step_flops() -> int:
    """Floating-point operations of the forward and backward pass of one batch."""
    model = make_plain_model().train()
    grids = torch.zeros(BATCH_SIZE, 16, 16, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        compute_plain_loss(model(grids), grids, torch.ones(10)).total.mean().backward()
    return int(counter.get_total_flops())


def measure_matmul_rate(device: torch.device, *, dtype: torch.dtype, repeats: int = 9) -> float:
    """Floating-point operations per second of a square matrix product, as a median."""
    size, num_products = MATMUL_SIZES[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(num_products):
            product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    # Without the first one, in which the kernel is chosen.
    return 2 * size**3 * num_products / statistics.median(seconds[1:])


def format_device(measured: dict[str, Any]) -> str:
    roofline = measured["roofline"]
    lines = [f"{measured['device']}, {measured['threads']} threads", "| | grids/s | Losslab is |"]
    lines.append("| --- | --- | --- |")
    for name, rate in measured["grids_per_second"].items():
        ratio = measured["losslab_times_as_fast_as"].get(name)
        lines.append(f"| {name} | {rate} | {f'{ratio}x as fast' if ratio else ''} |")
    lines.append(
        f"| roofline, {roofline['dtype']} at {roofline['matmul_gflop_per_second']} GFLOP/s "
        f"| {roofline['grids_per_second']} | at {roofline['losslab_share']:.0%} of it |"
    )
    for number, found in measured["workers"].items():
        lines.append(
            f"| workers: {number} | {found['grids_per_second']} together "
            f"| {found['times_the_first']}x the first of these lines |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
