#!/usr/bin/env bash
# Collects the wheels that run.sh installs on a GPU box without a network. torch is not among them:
#
#     benchmarks/gpu/wheels.sh [FOLDER] [PYTHON_VERSION]
#
# FOLDER is benchmarks/gpu/wheels unless it is given, and PYTHON_VERSION, such as 3.12, that of the
# python3 here. What the box has already can be deleted from FOLDER.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/wheels}
python_version=${2:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
mkdir -p "$folder"
# The package is built here, since its build fetches what the pages use.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$here/../.."
python3 -m pip download --quiet --dest "$folder" --find-links "$folder" \
    --only-binary :all: --python-version "$python_version" --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint "$here/../../constraints.txt" --requirement "$here/requirements.txt"
du -sh "$folder"
