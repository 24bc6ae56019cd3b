"""Files as people have them: taken and stored cleanly, or named for what they are."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npz_files import GRIDS, HOSTILE, describe, make_npy, make_npz, zip_members
from typer.testing import CliRunner

from server.cli.main import app
from server.files import arc, imports, npz
from server.files.datasets import read_file
from server.files.imports import FORMATS, NPZ, Fit, convert_upload, import_file, recognise
from server.files.npz import DatasetError
from server.settings import Settings

Json = dict[str, Any]
Store = Callable[[bytes], Path]


def make_grid(height: int, width: int, colour: int = 1) -> list[list[int]]:
    return [[colour] * width for _ in range(height)]


def make_task(number: int = 1, *, size: int = 5, num_pairs: int = 3) -> Json:
    """A task whose grids are of one colour."""
    pair = {"input": make_grid(size, 3, number % 10), "output": make_grid(2, size, number % 10)}
    return {"train": [pair] * num_pairs, "test": [pair]}


def make_tasks(number: int) -> Json:
    return {f"{n:08x}": make_task(n) for n in range(number)}


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


def make_zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def save(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Write a file and return its path."""

    def write(content: bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(content)
        return path

    return write


def convert(path: Path, **fit: int) -> dict[str, np.ndarray]:
    """The arrays that numpy itself reads from what is stored."""
    with path.open("r+b") as file:
        convert_upload(file, fit=Fit(**fit), shown_name="mine.npz")
    assert path.read_bytes().startswith(b"PK\x03\x04")
    read_file(path)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def refuse(path: Path, **fit: int) -> str:
    """The message with which the file is refused, by all that read it."""
    with pytest.raises(DatasetError) as raised:
        import_file(path, fit=Fit(**fit), shown_name="mine")
    return str(raised.value)


# -- ARC


def test_one_task_is_split_by_pair_and_its_tests_are_the_test_split(store: Store) -> None:
    task = make_task(1)
    task["test"] = [{"input": make_grid(12, 4, 7), "output": make_grid(1, 1, 8)}]
    arrays = convert(store(encode(task)))
    assert {key: array.shape for key, array in arrays.items()} == {
        "train": (4, 12, 12),
        "val": (2, 12, 12),
        "test": (2, 12, 12),
    }
    assert arrays["test"][0, :, :4].tolist() == make_grid(12, 4, 7)
    assert not arrays["test"][0, :, 4:].any()


@pytest.mark.parametrize(
    "content",
    [
        encode(make_tasks(20)),
        encode([make_task(n) for n in range(20)]),
        b"\xef\xbb\xbf \n" + encode(make_tasks(20)),
        json.dumps(make_tasks(20)).encode("utf-16"),
        make_zip({f"training/{key}.json": encode(task) for key, task in make_tasks(20).items()}),
        make_zip(
            {
                "ARC/README.md": b"# ARC",
                "ARC/LICENSE": b"",
                "__MACOSX/ARC/._a.json": b"\0",
                "ARC/.hidden.json": b"{",
                "ARC/all.JSON": encode(make_tasks(20)),
            }
        ),
    ],
    ids=["by id", "as a list", "with a mark", "UTF-16", "a zip", "a zip of a repository"],
)
def test_many_tasks_are_split_so_that_none_is_in_two_splits(store: Store, content: bytes) -> None:
    arrays = convert(store(content))
    assert {key: len(array) for key, array in arrays.items()} == {
        "train": 16 * 8,
        "val": 2 * 8,
        "test": 2 * 8,
    }
    assert arrays["train"].shape[1:] == (8, 8)
    again = convert(store(content))
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)


def test_evaluation_tasks_are_the_test_split(store: Store) -> None:
    members = {f"data/training/{n}.json": encode(make_task(1)) for n in range(9)}
    members |= {f"data/evaluation/e{n}.json": encode(make_task(2)) for n in range(3)}
    arrays = convert(store(make_zip(members)))
    assert {key: len(array) for key, array in arrays.items()} == {"train": 64, "val": 8, "test": 24}
    assert set(np.unique(arrays["test"])) == {0, 2}
    assert set(np.unique(arrays["train"])) == {0, 1}


def test_challenges_get_the_outputs_of_their_tests_from_the_solutions(store: Store) -> None:
    challenges = make_tasks(4)
    solutions = {key: [make_grid(3, 3, 9)] for key in challenges}
    for task in challenges.values():
        task["test"] = [{"input": make_grid(2, 2)}]
    alone = convert(store(encode(challenges)))
    members = {"a_solutions.json": encode(solutions), "a_challenges.json": encode(challenges)}
    both = convert(store(make_zip(members)))
    assert sum(map(len, both.values())) == sum(map(len, alone.values())) + 4
    assert sum(9 in grid for array in both.values() for grid in array) == 4


def make_uniform_zip(colours: dict[str, int]) -> bytes:
    """Tasks by the paths of their files, each of one colour."""
    return make_zip({path: encode(make_task(colour)) for path, colour in colours.items()})


def test_tasks_of_one_name_for_training_and_for_evaluation_are_all_kept(store: Store) -> None:
    colours = {f"training/{n}.json": 1 for n in range(9)}
    colours |= {f"evaluation/{n}.json": 2 for n in range(3)}
    arrays = convert(store(make_uniform_zip(colours)))
    assert {key: len(array) for key, array in arrays.items()} == {"train": 64, "val": 8, "test": 24}
    assert set(np.unique(arrays["test"])) == {0, 2}


def test_two_versions_of_a_task_are_in_one_split(store: Store) -> None:
    colours = {f"v{version}/{n}.json": 2 * n + version for version in (1, 2) for n in range(4)}
    arrays = convert(store(make_uniform_zip(colours)))
    assert sum(map(len, arrays.values())) == 8 * 8
    for array in arrays.values():
        found = set(np.unique(array)) - {0}
        assert all({2 * n + 1, 2 * n + 2} <= found for n in range(4) if 2 * n + 1 in found)


def test_task_that_is_there_twice_is_taken_once_and_with_all_of_its_outputs(store: Store) -> None:
    tasks = {f"{n}": make_task(n) for n in range(5)}
    without = {key: task | {"test": [{"input": make_grid(5, 3)}]} for key, task in tasks.items()}
    members = {"challenges.json": encode(without)}
    members |= {f"evaluation/{key}.json": encode(task) for key, task in tasks.items()}
    imported = import_file(store(make_zip(members)), fit=Fit())
    assert sum(map(len, imported.arrays.values())) == 5 * 8
    assert "5 more were there twice" in imported.note


def test_solutions_belong_to_the_tasks_beside_them(store: Store) -> None:
    members = {}
    for side, colour in (("training", 3), ("evaluation", 4)):
        tasks = make_tasks(4)
        for task in tasks.values():
            task["train"][0] = {"input": make_grid(2, 2, colour)}
            task["test"] = [{"input": make_grid(2, 2, colour)}]
        members[f"{side}_challenges.json"] = encode(tasks)
        members[f"{side}_solutions.json"] = encode(
            {key: [make_grid(4, 4, colour + 5)] for key in tasks}
        )
    arrays = convert(store(make_zip(members)))
    assert (arrays["test"] == 9).any()
    assert not (arrays["test"] == 8).any()
    assert not (arrays["train"] == 9).any()


def test_other_json_beside_the_tasks_of_a_zip_is_left_out_and_named(store: Store) -> None:
    members = {f"tasks/{n}.json": encode(make_task(n)) for n in range(3)}
    members |= {"app/package.json": b'{"name": "x"}'}
    imported = import_file(store(make_zip(members)), fit=Fit())
    assert len(imported.arrays["train"]) == 8
    assert "1 other file left out, such as app/package.json" in imported.note
    assert "only package.json" in refuse(store(make_zip({"package.json": b"{}"})))


def test_much_other_json_beside_the_tasks_is_not_read_to_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"tasks/{n}.json": encode(make_task(n)) for n in range(3)}
    members |= {f"other/{n}.json": b"[" + b"0.5," * 1000 + b"1]" for n in range(3)}
    monkeypatch.setattr(imports, "MAX_JSON_BYTES", 10_000)
    monkeypatch.setattr(arc, "MAX_JSON_BYTES", 10_000)
    message = refuse(store(make_zip(members)))
    assert "more than 10000 bytes of JSON that is no ARC task, such as other/0.json" in message


def test_numbers_that_are_no_colours_are_not_converted(store: Store) -> None:
    # To convert this one takes a hundred times as long as another one.
    number = b"2.22507385850720113605740979670913197593481954635164564e-308"
    task = encode(make_task())[:-1] + b', "x": [' + number + b"]}"
    parsed = arc._parse(task)
    assert not isinstance(parsed["x"][0], float)
    assert import_file(store(task), fit=Fit()).arrays


def test_lists_of_pairs_are_tasks(store: Store) -> None:
    members = {f"tasks/{n}.json": encode(make_task(n)["train"]) for n in range(3)}
    assert {key: len(a) for key, a in convert(store(make_zip(members))).items()} == {
        "train": 6,
        "val": 6,
        "test": 6,
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [make_grid(2, 2)]}, "solutions"),
        ({"a": [{"attempt_1": make_grid(2, 2), "attempt_2": []}]}, "submission"),
        ({"images": [make_grid(2, 2)] * 20}, "**{k: numpy.array(v, 'uint8') for k, v in"),
        ([make_grid(2, 2)] * 20, "images=numpy.array(json.load"),
        ({"option": "b"}, "no ARC task"),
        ([], "no ARC task"),
        ([1, 2], "no ARC task"),
        ({}, "no ARC task"),
        ({"train": [{"input": [[10]], "output": [[0]]}]}, "10 is no colour"),
        ({"train": [{"input": [[-1]]}]}, "-1 is no colour"),
        ({"train": [{"input": [[True]]}]}, "no colour"),
        ({"train": [{"input": [[0.0]]}]}, "a number with a point or an exponent is no colour"),
        ({"train": [{"input": [[10**4000]]}]}, "no colour"),
        ({"train": [{"input": [["x" * 9999]]}]}, "a str is no colour"),
        ({"train": [{"input": [[{"a": 1}]]}]}, "no colour"),
        ({"train": [{"input": [[0], [0, 0]]}]}, "different lengths"),
        ({"train": [{"input": [[]]}]}, "different lengths"),
        ({"train": [{"input": []}]}, "list of rows"),
        ({"train": [{"input": 5}]}, "list of rows"),
        ({"train": [{"input": [[0]]}], "test": 5}, "test is no list"),
        ({"train": [{"input": [[0]], "output": [[0]]}]}, "three tasks"),
    ],
)
def test_other_json_is_named_for_what_it_is(store: Store, value: object, words: str) -> None:
    message = refuse(store(encode(value)))
    assert words in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (b'{"train": [{"input": [[' + b"9" * 5000 + b"]]}]}", "no valid JSON"),
        (b'{"train": [{"input": [[NaN]]}]}', "no number of JSON"),
        (b'{"train": [{"input": [[1e999]]}]}', "no colour"),
        (b'{"a": 1}\n{"a": 2}\n', "one per line"),
        (b'{"train": [{"input": [[0', "truncated?"),
        (b'{"a": "\xff"}', "no valid JSON"),
    ],
    ids=["lists", "objects", "digits", "NaN", "infinite", "lines", "cut", "bytes"],
)
def test_hostile_json_is_refused(store: Store, content: bytes, words: str) -> None:
    assert words in refuse(store(content))
    assert words in refuse(store(make_zip({"a.json": content})))


def test_json_is_read_only_if_it_is_small_enough(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(make_tasks(20))
    for module in ("server.files.arc", "server.files.imports"):
        monkeypatch.setattr(f"{module}.MAX_JSON_BYTES", len(content) - 1)
    monkeypatch.setattr(arc.json, "loads", None)  # whoever calls it fails
    assert "are allowed" in refuse(store(content))
    assert "is above" in refuse(store(make_zip({"a.json": content})))


def test_tiny_grids_do_not_become_gigabytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arc, "MAX_UNPACKED_BYTES", 20 * 8 * 32 * 32 - 1)
    assert "more than" in refuse(store(encode(make_tasks(20))), pad=32)


# -- sizes


def test_grids_of_arc_s_largest_size_become_32(store: Store) -> None:
    tasks = make_tasks(3) | {"z": make_task(1, size=30)}
    assert convert(store(encode(tasks)))["train"].shape[1:] == (32, 32)


def test_grids_above_the_limit_are_cut_only_if_asked(store: Store) -> None:
    content = encode({key: make_task(1, size=40) for key in "abc"})
    message = refuse(store(content))
    assert "24 of 24 grids are larger than 32x32 (at most 40)" in message
    assert "--crop 32" in message
    assert convert(store(content), crop=32)["train"].shape == (8, 32, 32)
    assert "--crop 16" in refuse(store(content), pad=16)
    assert convert(store(content), pad=16, crop=16)["train"].shape == (8, 16, 16)


def test_arrays_are_padded_with_background_if_asked(store: Store) -> None:
    grids = np.ones((20, 30, 28), dtype=np.uint8)
    message = refuse(store(make_npz(images=grids)))
    assert "--pad 32" in message
    assert "numpy.pad(images, ((0, 0), (0, 2), (0, 4)))" in message
    (padded,) = convert(store(make_npz(images=grids)), pad=32).values()
    assert padded.shape == (20, 32, 32)
    assert padded.sum() == grids.sum()
    assert (padded[:, :30, :28] == 1).all()


def test_arrays_are_cut_from_the_top_left_if_asked(store: Store) -> None:
    grids = np.arange(20 * 40 * 40).reshape(20, 40, 40) % 10
    assert "--crop 32" in refuse(store(make_npz(images=grids)))
    assert "larger than 32x32" in refuse(store(make_npz(images=grids)), pad=32)
    (cut,) = convert(store(make_npz(images=grids)), crop=32).values()
    assert np.array_equal(cut, grids[:, :32, :32])


def test_splits_of_different_sizes_are_padded_to_one(store: Store) -> None:
    content = make_npz(train=GRIDS, val=GRIDS, test=np.zeros((9, 4, 4), dtype=np.int8))
    assert "--pad 8" in refuse(store(content))
    assert {array.shape[1] for array in convert(store(content), pad=8).values()} == {8}


@pytest.mark.parametrize("fit", [{"pad": 30}, {"pad": 0}, {"crop": -4}, {"pad": 8, "crop": 4}])
def test_sizes_that_no_grid_may_have_are_refused(store: Store, fit: dict[str, int]) -> None:
    assert "pad" in refuse(store(make_npz(images=GRIDS)), **fit) or "crop" in fit


# -- arrays


def test_bare_array_is_taken_as_images(store: Store) -> None:
    grids = np.arange(20 * 64, dtype=">i4").reshape(20, 8, 8) % 10
    assert np.array_equal(convert(store(save(grids)))["images"], grids)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[[{}] * 4] * 4] * 10, dtype=object), "Python objects"),
        (GRIDS.astype(np.float32), ".astype('uint8')"),
        (GRIDS[0], "shape (8, 8)"),
        (GRIDS[..., None], "array.squeeze(-1)"),
        (GRIDS[:, None], "array.squeeze(1)"),
        (np.float64(3), "has shape ()"),
        (np.zeros((20, 8, 8, 10), dtype=int), "array.argmax(-1)"),
        (np.zeros((20, 64), dtype=int), "array.reshape(-1, 8, 8)"),
        (GRIDS[:5], "train, val and test"),
    ],
)
def test_advice_on_a_bare_array_follows_from_its_header(
    store: Store, array: np.ndarray, words: str
) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    path = store(file.getvalue())
    assert words in refuse(path)
    with pytest.raises(DatasetError) as raised:  # the same for a file that was put in the folder
        read_file(path)
    assert words in str(raised.value)
    assert "numpy.savez(file, images=array)" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["x_train", "y_train", "x_val", "x_test"], "train=d['x_train'], val=d['x_val'], test="),
        (["x_train", "y_train", "x_test", "y_test"], "concatenate([d['x_train'], d['x_test']])"),
        (["arr_0"], "images=d['arr_0']"),
        (["a/train", "a/val", "a/test"], "train=d['a/train']"),
        (["first", "second"], "it has ['first', 'second']"),
        (["__MACOSX/._a", "a"], "images=d['a']"),
    ],
)
def test_other_usual_names_get_the_line_that_renames_them(
    store: Store, keys: list[str], words: str
) -> None:
    message = refuse(store(make_npz(**dict.fromkeys(keys, GRIDS))))
    assert "needs the keys train, val and test, or images" in message
    assert words in message


# -- what is stored can be read by others


FORM = b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n"


@pytest.mark.parametrize(
    "content",
    [
        FORM + make_npz(images=GRIDS) + b"\r\n--b--\r\n",
        b"Downloading ... done\n" + make_npz(images=GRIDS),
        b"\n" * 5000 + make_npz(images=GRIDS),
        make_npz(images=GRIDS) + b"\n",
        make_npz(images=GRIDS) + bytes(50_000),
        make_npz(images=GRIDS[::-1]) + make_npz(images=GRIDS),
    ],
    ids=["form", "line before", "many lines before", "line behind", "much behind", "twice"],
)
def test_archive_with_other_bytes_around_it_is_refused(store: Store, content: bytes) -> None:
    path = store(content)
    for read in (read_file, lambda path: import_file(path, fit=Fit())):
        with pytest.raises(DatasetError, match="bare file"):
            read(path)


def test_array_that_stands_twice_is_refused(store: Store) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for value in (0, 1):
                archive.writestr("images.npy", save(GRIDS + value))
    assert "twice" in refuse(store(file.getvalue()))


def test_archive_with_a_comment_and_large_archives_are_read(store: Store) -> None:
    file = io.BytesIO(make_npz(images=GRIDS))
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"of mine"
    assert read_file(store(file.getvalue()))["images"].shape == GRIDS.shape
    large = io.BytesIO()
    limits = zipfile.ZIP_FILECOUNT_LIMIT
    zipfile.ZIP_FILECOUNT_LIMIT = 0  # type: ignore[misc]
    try:
        with zipfile.ZipFile(large, "w") as archive:
            archive.writestr("images.npy", save(GRIDS))
    finally:
        zipfile.ZIP_FILECOUNT_LIMIT = limits  # type: ignore[misc]
    assert b"PK\x06\x07" in large.getvalue()
    assert read_file(store(large.getvalue()))["images"].shape == GRIDS.shape


def test_list_of_files_is_measured_before_it_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(make_zip({f"{n}.txt": b"" for n in range(100)}))
    monkeypatch.setattr(npz, "_MAX_DIRECTORY_BYTES", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # whoever opens it fails
    assert "too many files" in refuse(path)


def tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("mine.npz")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "title", "remedy"),
    [
        (b"", "empty file", "sent nothing"),
        (zip_members(), "empty archive", "no array"),
        (gzip.compress(make_npz(images=GRIDS)), "gzip", "gunzip"),
        (bz2.compress(b"a"), "bzip2", "unpack"),
        (lzma.compress(b"a"), "xz", "unpack"),
        (tar(make_npz(images=GRIDS)), "tar", "zip"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z", "unpack"),
        (pickle.dumps(GRIDS), "pickle", "ever unpickled"),
        (pickle.dumps(GRIDS, protocol=0), "pickle", "ever unpickled"),
        (pickle.dumps([GRIDS], protocol=0), "pickle", "ever unpickled"),
        (b"1,2,3\n4,5,6\n", "CSV", "numpy.savez"),
        (b"a;b\n", "CSV", "numpy.savez"),
        (b"\x89HDF\r\n\x1a\n", "HDF5", "numpy.savez"),
        (b"PAR1....PAR1", "Parquet", "numpy.savez"),
        (b"\x89PNG\r\n\x1a\n", "picture", "numpy.savez"),
        (b"\x40\0\0\0\0\0\0\0{", "safetensors", "numpy.savez"),
        (b"<!DOCTYPE html>", "HTML", "the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
        (FORM, "form", "curl -T"),
        (make_zip({"archive/data.pkl": b"", "archive/data/0": b""}), "PyTorch", "weights_only"),
        (make_zip({"[Content_Types].xml": b"", "xl/a.xml": b""}), "office", "numpy.savez"),
        (make_zip({"README.md": b"", "a/mine.npz": b""}), "holds 'a/mine.npz'", "unpack it first"),
        (make_zip({"a.json.gz": b""}), "holds 'a.json.gz'", "unpack it first"),
        (make_zip({"a.png": b"", "b.png": b""}), "no array, only a.png, b.png", "an .npz has"),
    ],
)
def test_file_of_another_kind_is_named_with_what_helps(
    store: Store, content: bytes, title: str, remedy: str
) -> None:
    path = store(content)
    for message in (refuse(path), refuse_in_folder(path)):
        assert title in message
        assert remedy in message
        assert "truncated" not in message


def refuse_in_folder(path: Path) -> str:
    with pytest.raises(DatasetError) as raised:
        read_file(path)
    return str(raised.value)


@pytest.mark.parametrize(
    "content", [encode(make_task()), make_zip({"a.json": encode(make_task())}), save(GRIDS)]
)
def test_file_that_is_taken_is_named_where_only_an_npz_is(store: Store, content: bytes) -> None:
    assert "losslab data import" in refuse_in_folder(store(content))


MARKS = [
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x93NUMPY\1\0",
    b"{",
    b"[",
    b"\x80\4",
    b"\x1f\x8b",
    b"--",
    b"",
]
GOOD = [
    make_npz(images=GRIDS), save(GRIDS), encode(make_tasks(3)),
    make_zip({f"{n}.json": encode(make_task(n)) for n in range(3)}),
]  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(MARKS), st.binary(max_size=400))
def test_whatever_follows_a_mark_is_refused_in_words(
    tmp_path: Path, mark: bytes, rest: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(mark + rest)
    assert refuse(path).startswith("mine")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.sampled_from(GOOD),
    place=st.floats(0, 1, exclude_max=True),
    change=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
)
def test_changed_files_are_refused_or_stored_so_that_numpy_reads_them(
    tmp_path: Path, content: bytes, place: float, change: bytes, cut: bool
) -> None:
    start = int(place * len(content))
    path = tmp_path / "file"
    path.write_bytes(content[:start] + change + (b"" if cut else content[start + len(change) :]))
    try:
        with path.open("r+b") as file:
            convert_upload(file, fit=Fit(), shown_name="mine")
        stored = read_file(path)
    except DatasetError:
        return
    with np.load(path, allow_pickle=False) as archive:
        for key, grids in stored.items():
            assert np.array_equal(archive[key], grids)
            assert grids.max() <= 9


KEYS = st.sampled_from(["train", "test", "input", "output", "a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_any_json_is_refused_in_words_or_taken(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode(value))
    try:
        arrays = import_file(path, fit=Fit()).arrays
    except DatasetError as error:
        assert len(str(error)) < 600
    else:
        assert set(arrays) == {"train", "val", "test"}


def test_header_of_many_dimensions_is_refused(store: Store) -> None:
    message = refuse(store(make_npy(describe(f"({'1, ' * 3000})"))))
    assert "3000 dimensions" in message
    assert len(message) < 200


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_files_are_not_imported_either(store: Store, kind: str) -> None:
    refuse(store(HOSTILE[kind]))
    assert not Path("unpickled").exists()


def test_each_format_has_a_reader_or_a_remedy() -> None:
    for each in FORMATS:
        assert each.read or each.remedy, each.title


def test_npz_stays_as_it_is_unless_it_is_to_be_fitted(store: Store) -> None:
    content = make_npz(images=GRIDS)
    path = store(content)
    convert(path)
    assert path.read_bytes() == content
    assert recognise(path) is NPZ
    assert convert(path, pad=16)["images"].shape == (20, 16, 16)


# -- over HTTP, and from the command line


def test_upload_says_what_became_of_the_file(client: TestClient, settings: Settings) -> None:
    content = encode(make_tasks(20))
    answer = client.put(
        "/datasets/k", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["note"] == (
        "20 ARC tasks: 160 grids, filled up to 8x8 with background; split by task: 128 grids for "
        "training, 16 for validation, 16 for testing"
    )
    assert client.get("/datasets/k").json()["num_grids"] == {"train": 128, "val": 16, "test": 16}
    assert (settings.datasets_dir / "k.npz").read_bytes().startswith(b"PK")
    assert client.put("/datasets/k", content=content).status_code == 200
    packed = make_zip({"a.json": content})
    assert client.put("/datasets/k", content=packed).status_code == 200
    assert client.put("/datasets/k", content=content, params={"pad": 12}).status_code == 409


def test_same_grids_packed_in_another_way_are_the_same_data_set(client: TestClient) -> None:
    client.put("/datasets/mine", content=make_npz(images=GRIDS)).raise_for_status()
    again = zip_members(zipfile.ZIP_DEFLATED, images=save(GRIDS.astype(np.int64)))
    assert client.put("/datasets/mine", content=again).status_code == 200
    assert client.put("/datasets/mine", content=make_npz(images=GRIDS + 1)).status_code == 409


def test_size_is_a_part_of_the_upload(client: TestClient) -> None:
    content = make_npz(images=np.ones((20, 30, 30), dtype=np.uint8))
    assert "?pad=32" in client.put("/datasets/g", content=content).json()["detail"]
    assert client.put("/datasets/g?pad=31", content=content).status_code == 422
    answer = client.put("/datasets/g?pad=32", content=content)
    assert (answer.status_code, answer.json()["grid_size"]) == (201, 32)


def test_form_is_refused_with_the_command_that_sends_the_bare_file(
    client: TestClient, settings: Settings
) -> None:
    answer = client.put("/datasets/m", files={"file": ("mine.npz", make_npz(images=GRIDS))})
    assert answer.status_code == 422
    assert "curl -T FILE http://" in answer.json()["detail"]
    assert "/datasets/m" in answer.json()["detail"]
    assert client.put("/datasets/m", content=make_npz(images=GRIDS)).status_code == 201


def test_body_that_curl_calls_a_form_is_taken_if_it_is_none(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.put("/datasets/m", content=make_npz(images=GRIDS), headers=headers)
    assert answer.status_code == 201


def run_here(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", "import", "--local", *arguments])
    return done.exit_code, done.output


def test_command_imports_into_the_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "My Tasks.json"
    path.write_bytes(encode(make_tasks(20)))
    folder = ["--data-dir", str(tmp_path / "lab")]
    code, output = run_here(str(path), *folder)
    assert code == 0, output
    assert "My-Tasks" in output
    assert "split by task" in " ".join(output.split())
    assert set(read_file(tmp_path / "lab" / "datasets" / "My-Tasks.npz")) == set(npz.SPLITS)
    assert run_here(str(path), "--pad", "12", "--name", "wide", "--json", *folder)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.npz"], "gone.npz"),
        (["."], "is a folder"),
        (["a.txt", "--name", "x/y"], "letters"),
        (["a.txt", "--name", "arc"], "built in"),
        (["a.txt", "--pad", "5"], "pad is one of"),
        (["a.txt"], "no readable .npz"),
    ],
)
def test_command_says_in_one_line_why_a_file_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(b"text")
    code, output = run_here(*arguments, "--data-dir", "lab")
    assert code in (1, 2)
    assert words in output
    assert output.startswith("Error: ")
    assert output.count("\n") == 1
    assert not list(tmp_path.glob("lab/datasets/*"))
