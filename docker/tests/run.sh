#!/usr/bin/env bash
# Build both images and test the CPU stack, even on a machine without a container engine.
# LOSSLAB_SKIP_DOCKER=1 skips this.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}

if [ -n "${LOSSLAB_SKIP_DOCKER:-}" ]; then
    echo "docker tests: SKIPPED, as LOSSLAB_SKIP_DOCKER asks"
    exit 0
fi
fail() { echo "docker tests: $1; set LOSSLAB_SKIP_DOCKER=1 to leave them out" >&2; exit 1; }

missing=()
for program in docker:docker.io dockerd:docker.io docker-compose:docker-compose debootstrap:debootstrap; do
    command -v "${program%%:*}" > /dev/null || missing+=("${program##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || fail "${missing[*]} missing, and only root can install them"
    apt-get update -q && apt-get install -qy --no-install-recommends "${missing[@]}" iptables \
        || fail "${missing[*]} cannot be installed"
fi

engine=
download=
stand_ins=()
clean_up() {
    if [ -n "$download" ]; then
        kill "$download" 2> /dev/null || true
        wait "$download" || true
    fi
    # A later build of the GPU stack would install these wheels.
    rm -f docker/wheels/*.whl
    if [ -n "$engine" ]; then
        kill "$engine" && wait "$engine" || true
        rm -rf "$scratch"
    else
        docker image rm losslab-{server,worker-cpu}:test "${stand_ins[@]}" > /dev/null 2>&1 || true
    fi
}
trap clean_up EXIT

if ! docker info > /dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || fail "no engine answers, and only root can start one"
    scratch=$(mktemp -d)
    # vfs copies whole images, but works on any file system.
    for driver in overlay2 vfs; do
        dockerd --storage-driver "$driver" --data-root "$scratch/$driver" \
            --exec-root "$scratch/exec" --pidfile "$scratch/pid" > "$scratch/log" 2>&1 &
        engine=$!
        for _ in $(seq 60); do
            docker info > /dev/null 2>&1 && break 2
            kill -0 $engine 2> /dev/null || break
            sleep 1
        done
        kill $engine 2> /dev/null && wait $engine || true
    done
    docker info > /dev/null || { tail -20 "$scratch/log" >&2; fail "the engine does not start"; }
fi

for image in python:3.11-slim-bookworm postgres:17-bookworm; do
    docker image inspect "$image" > /dev/null 2>&1 || timeout 120 docker pull -q "$image" || {
        echo "docker tests: $image cannot be pulled; using a stand-in"
        stand_ins+=("$image")
    }
done
"$python" -m pip download --quiet --disable-pip-version-check -d docker/wheels -c constraints.txt \
    torch '.[worker]' 'setuptools>=77' &
download=$!
docker/tests/stand_ins.sh python:3.11-slim-bookworm postgres:17-bookworm
wait $download || fail "what the images hold cannot be downloaded"
# -s shows the sizes and times that are measured.
"$python" -m pytest -x -v -s --durations=12 -p no:cacheprovider docker/tests/test_{stack,backup,compose}.py
