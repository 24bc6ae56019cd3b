"""Sources, splits, symmetries and batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from server.models.configuration import TrainingConfig
from server.settings import Settings
from worker.data import (
    Dataset,
    DeviceGrids,
    compute_symmetries,
    draw_reconstruction_batches,
    load_dataset,
)

CPU = torch.device("cpu")
#: 200 grids of seed 7 as they were before the data had a seed of their own, by data set.
OLD_DATA = {
    "atomic": "3b7ee7f896569a609fadbe8e93c11a4478d4a839eab15bf320f97feaa2ff7eb9",
    "arc": "f556d4eb3a2302366a3146df109869b6a98c995b393fb9c5afd39661ecd58241",
    "mine": "ab4992c169f89d5e1c8fd6d86439ebb9a482327b98305e6b30df400de27e0d17",
}


def load(settings: Settings, **config: object) -> Dataset:
    return load_dataset(
        TrainingConfig.model_validate(config),
        datasets_dir=settings.datasets_dir,
        cache_dir=settings.cache_dir,
    )


def random_grids(num_grids: int, *, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, (num_grids, size, size), dtype=np.int64)


def test_atomic_is_split_80_10_10_and_cached(settings: Settings) -> None:
    first = load(settings, num_samples=1000)
    assert [len(first.train), len(first.val), len(first.test)] == [800, 100, 100]
    assert len(list(settings.cache_dir.iterdir())) == 1
    again = load(settings, num_samples=1000)
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


def test_arc_is_the_real_tasks_with_the_evaluation_set_as_test_split(settings: Settings) -> None:
    dataset = load(settings, dataset="arc")
    assert dataset.grid_size == 16
    assert len(dataset.train) > 1500
    assert len(dataset.val) == pytest.approx(len(dataset.train) / 8, rel=0.01)
    assert len(dataset.test) > 1000
    background_share = dataset.count_colours()[0] / dataset.train.size
    assert 0.5 < background_share < 0.95


def test_arc_test_split_shares_no_grid_order_with_training(settings: Settings) -> None:
    first, second = load(settings, dataset="arc"), load(settings, dataset="arc", seed=7)
    assert np.array_equal(first.test, second.test)
    assert not np.array_equal(first.val, second.val)


@pytest.mark.parametrize(("name", "sha256"), OLD_DATA.items())
def test_configuration_from_before_the_seed_of_the_data_has_the_data_it_always_had(
    settings: Settings, write_npz: Callable[..., str], name: str, sha256: str
) -> None:
    write_npz(images=random_grids(50))
    old = TrainingConfig().model_dump(exclude={"data_seed"})
    dataset = load(settings, **old | {"dataset": name, "num_samples": 200, "seed": 7})
    assert dataset.compute_sha256() == sha256


@pytest.mark.parametrize("name", OLD_DATA)
def test_data_follow_their_own_seed_alone(
    settings: Settings, write_npz: Callable[..., str], name: str
) -> None:
    write_npz(images=random_grids(50))
    config = {"dataset": name, "num_samples": 200, "data_seed": 7}
    for seed in (1, 2):
        assert load(settings, **config, seed=seed).compute_sha256() == OLD_DATA[name]
    assert load(settings, **config | {"data_seed": 8}, seed=7).compute_sha256() != OLD_DATA[name]


def test_corpus_is_kept_once_for_all_jobs_with_its_seed(settings: Settings) -> None:
    for seed in (1, 2, 3):
        load(settings, num_samples=200, data_seed=7, seed=seed)
    (cached,) = settings.cache_dir.iterdir()
    # The name from before: a later version finds the corpus of an earlier one.
    assert cached.name == "atomic-v1-200-seed7.npy"
    load(settings, num_samples=200, seed=7)
    assert list(settings.cache_dir.iterdir()) == [cached]


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
    dataset = load(settings, dataset=name)
    assert np.array_equal(dataset.train, grids[:20])
    assert np.array_equal(dataset.val, grids[20:25])
    assert np.array_equal(dataset.test, grids[25:])


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
