"""Several runs at the same time in one process, each in a thread with a stream of its own.

Trains 1, 2, 4 and 8 runs of option b together and prints the grids per second of all, and whether
each has the numbers that it has alone, to the last bit. Writes `results/slots.json`; on a GPU it
takes about a minute:

    python -m benchmarks.slots
"""

import argparse
import threading
import time
from dataclasses import asdict
from typing import Any

from benchmarks.machine import describe_machine, write_results
from server.models.configuration import TrainingConfig, resolve_config
from server.models.options import OPTIONS, BuiltInOption
from worker.atomic import generate_atomic
from worker.data import Dataset
from worker.device import choose_device, describe_device, keep_freed_memory, own_stream
from worker.training import EpochResult, Trainer

PACKAGES = ("losslab", "torch", "numpy")
#: Epochs that are not timed, in which steps are compiled and captured.
NUM_FIRST = 1


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    num_grids = 320 if arguments.toy else 100_000
    grids = generate_atomic(num_grids=num_grids, seed=0)
    num_train = num_grids * 8 // 10
    half = (num_grids + num_train) // 2
    dataset = Dataset(grids[:num_train], grids[num_train:half], grids[half:])
    num_epochs = NUM_FIRST + (1 if arguments.toy else 3)
    alone: dict[int, list[Any]] = {}
    results = describe_machine(PACKAGES) | {
        "device": describe_device(choose_device()),
        "grids_per_epoch": num_train,
        "rows": [],
    }
    for number in [1, 1, 2] if arguments.toy else [1, 1, 2, 4, 8, 8]:
        runs = train_together(number, dataset, num_epochs=num_epochs)
        for seed in range(number):
            alone.setdefault(
                seed, train_together(1, dataset, num_epochs=num_epochs, first=seed)[0][1]
            )
        seconds = max(taken for taken, _ in runs)
        row = {
            "runs": number,
            "grids_per_second": round(number * (num_epochs - NUM_FIRST) * num_train / seconds),
            "seconds_per_epoch_and_run": round(seconds / (num_epochs - NUM_FIRST) / number, 4),
            "equal_to_each_alone": all(
                alone[seed] == found for seed, (_, found) in enumerate(runs)
            ),
        }
        results["rows"].append(row)
        print(row, flush=True)
        write_results(arguments.results, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny runs, to try the script itself")
    parser.add_argument("--results", default="slots", help="name of the file in results/")
    return parser.parse_args()


def train_together(
    number: int, dataset: Dataset, *, num_epochs: int, first: int = 0
) -> list[tuple[float, list[dict[str, Any]]]]:
    """The seconds of each run after its first epoch, and the numbers of all its epochs."""
    runs: dict[int, tuple[float, list[dict[str, Any]]]] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(number)

    def train(seed: int) -> None:
        try:
            with own_stream():
                epochs = Trainer(
                    make_config(seed, num_epochs), dataset, device=choose_device()
                ).epochs()
                found = [describe(next(epochs)) for _ in range(NUM_FIRST)]
                barrier.wait()
                begun = time.perf_counter()
                found += [describe(result) for result in epochs]
                runs[seed] = time.perf_counter() - begun, found
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=train, args=(first + index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [runs[seed] for seed in sorted(runs)]


def make_config(seed: int, num_epochs: int) -> TrainingConfig:
    preset = OPTIONS[BuiltInOption.b].config
    return resolve_config(preset, overrides={"epochs": num_epochs, "seed": seed, "data_seed": 0})


def describe(result: EpochResult) -> dict[str, Any]:
    """What is equal in two runs that are the same."""
    numbers = asdict(result)
    del numbers["seconds"], numbers["grids_per_second"]
    return numbers


if __name__ == "__main__":
    main()
