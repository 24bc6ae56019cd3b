"""Valid and malicious data sets, as bytes."""

import io
import pickle
import struct
import zipfile

import numpy as np

GRIDS = np.zeros((20, 8, 8), dtype=np.uint8)


class Exploit:
    """Creates a file if it is ever unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("unpickled", "w")


def make_npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def zip_members(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def make_npy(header: str, *, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An array with an arbitrary header."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode() + data


def describe(shape: str = "(20, 8, 8)", *, dtype: str = "'|u1'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"


def claim_size(archive: bytes, *, num_bytes: int) -> bytes:
    """The archive with a false unpacked size in its directory."""
    at = archive.rindex(b"PK\x01\x02") + 24
    return archive[:at] + struct.pack("<I", num_bytes) + archive[at + 4 :]


#: Sixteen kilobytes that unpack to sixteen megabytes.
BOMB = zip_members(
    zipfile.ZIP_DEFLATED, images=make_npy(describe("(16384, 32, 32)")) + bytes(2**24)
)
HOSTILE: dict[str, bytes] = {
    "pickle": pickle.dumps(Exploit()),
    "pickle as a member": zip_members(images=pickle.dumps(Exploit())),
    "array of objects": make_npz(images=np.array([[[Exploit()] * 4] * 4] * 10, dtype=object)),
    "objects by the header": zip_members(
        images=make_npy(describe(dtype="'|O'"), data=pickle.dumps([Exploit()] * 1280))
    ),
    "structured objects": zip_members(images=make_npy(describe(dtype="[('a', '|O')]"))),
    "bomb of gigabytes": claim_size(BOMB, num_bytes=2**32 - 2),
    "bomb that claims little": claim_size(BOMB, num_bytes=1000),
    "terabyte by the header": zip_members(images=make_npy(describe("(1073741824, 32, 32)"))),
    "overflowing shape": zip_members(images=make_npy(describe(f"({2**63}, 8, 8)"))),
    "negative shape": zip_members(images=make_npy(describe("(-20, 8, 8)"))),
    "shape of texts": zip_members(images=make_npy(describe("('20', 8, 8)"))),
    "code in the header": zip_members(images=make_npy("__import__('os').mkdir('unpickled')")),
    "huge header": zip_members(images=make_npy(describe() + " " * 50_000)),
    "huge header of version 2": zip_members(
        images=make_npy(describe() + " " * 10_000_000, version=(2, 0))
    ),
    "header that claims a gigabyte": zip_members(
        zipfile.ZIP_DEFLATED, images=b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + bytes(2**20)
    ),
    "nested header": zip_members(images=make_npy("(" * 9000 + ")" * 9000)),
    "header of the future": zip_members(images=make_npy(describe(), version=(9, 9))),
    "header that never ends": zip_members(images=make_npy("{'descr': (")),
    "broken LZMA": zip_members(
        zipfile.ZIP_LZMA, images=make_npy(describe(), data=bytes(1280))
    ).replace(b"\x5d\x00\x00\x80\x00", b"\xff\xff\xff\xff\xff", 1),
    "name in no encoding": make_npz(images=GRIDS).replace(b"images.npy", b"\xff\xfe\xffges.npy"),
    "truncated archive": make_npz(images=GRIDS)[:300],
    "truncated array": zip_members(images=make_npy(describe(), data=bytes(100))),
    "flipped bytes": make_npz(images=GRIDS).replace(bytes(64), b"\x01" * 64, 1),
    "values of 10": make_npz(images=GRIDS + 10),
    "negative values": make_npz(images=GRIDS.astype(np.int8) - 1),
    "floats": make_npz(images=GRIDS.astype(np.float64)),
    "not a number": make_npz(images=np.full((20, 8, 8), np.nan)),
    "texts": make_npz(images=np.full((20, 8, 8), "a")),
    "dates": make_npz(images=np.zeros((20, 8, 8), dtype="datetime64[s]")),
    "complex": make_npz(images=GRIDS.astype(np.complex64)),
    "strings of records": make_npz(images=np.zeros((20, 8, 8), dtype=[("a", "u1"), ("b", "u1")])),
    "two dimensions": make_npz(images=GRIDS[0]),
    "no grid": make_npz(images=GRIDS[:0]),
    "other keys": make_npz(other=GRIDS),
    "paths as keys": zip_members(**{"../../images": make_npy(describe(), data=bytes(1280))}),
    "nothing": b"",
    "an empty archive": zip_members(),
    "no archive": b"not a zip" * 100,
    "html": b"<script>alert(1)</script>",
}
