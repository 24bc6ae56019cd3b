#!/usr/bin/env bash
# Installs, tests and measures Losslab on a GPU box that has a torch with CUDA and no network, in at
# most nine minutes. Each part has its own limit and writes its results as it ends:
#
#     benchmarks/gpu/run.sh            WHEELS, PYTHON and RESULTS_DIR may be set
#
# WHEELS is the folder that wheels.sh filled. With REHEARSAL=1 the same happens on a CPU with toys
# in place of trainings: nothing but the script itself is tried then.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
wheels=${WHEELS:-$here/wheels}
python=${PYTHON:-python3}
export RESULTS_DIR=${RESULTS_DIR:-$here/../results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LOSSLAB_DATA_DIR=$work/data TORCHINDUCTOR_CACHE_DIR=$work/compiled

toy=()
if [ -n "${REHEARSAL:-}" ]; then
    toy=(--toy)
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "$python has no torch that sees a GPU; PYTHON may name another one" >&2
    exit 2
fi

# Everything that is missing is named before anything starts.
"$python" - "$wheels" "$here/requirements.txt" << 'END' || exit 2
import re, sys
from importlib.metadata import distributions
from pathlib import Path

def tidy(name):
    return re.sub(r"[-_.]+", "-", name).lower()

wheels, requirements = map(Path, sys.argv[1:])
there = {tidy(found.metadata["Name"]) for found in distributions() if found.metadata["Name"]}
there |= {tidy(path.name.partition("-")[0]) for path in wheels.glob("*.whl")}
lines = [line.strip() for line in requirements.read_text().splitlines()]
missing = [line for line in lines if line and line[0] != "#" and tidy(line) not in there]
if not list(wheels.glob("losslab-*.whl")):
    missing.append("losslab")
if missing:
    names = ", ".join(dict.fromkeys(missing))
    sys.exit(f"missing in {wheels}: {names}; benchmarks/gpu/wheels.sh collects them")
END

failed=()
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$seconds" "$@"
    local status=$?
    [ "$status" = 0 ] || failed+=("$name ($status)")
    echo "== $name: status $status after $((SECONDS - begun)) s of at most $seconds"
}

install() {
    python3=$work/venv/bin/python
    # What PYTHON has is seen from the environment, and what the wheels bring comes first.
    "$python" -m venv "$work/venv" &&
    "$python" -c 'import site, sysconfig
print(sysconfig.get_path("purelib"))
print(sysconfig.get_path("platlib"))' > "$work/parent.pth" &&
    cp "$work/parent.pth" "$("$python3" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &&
    "$python3" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" \
        --requirement "$here/requirements.txt" &&
    "$python3" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --force-reinstall "$wheels"/losslab-*.whl
}
export -f install
export work python wheels here
part install 60 bash -c install
[ "${#failed[@]}" = 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }

run=$work/venv/bin/python
part tests 200 "$run" -m pytest -q -p no:cacheprovider \
    -k "not postgresql and (test_gpu or test_capture or test_step or test_slots or mid_batch)" \
    tests/test_{gpu,capture,step,slots,faults}.py ${REHEARSAL:+--collect-only}
part slots 90 "$run" -m benchmarks.slots --results gpu_slots "${toy[@]}"
part training 80 "$run" -m benchmarks.training --results gpu_training --names losslab,plain \
    --rounds 5 ${REHEARSAL:+--names losslab --rounds 1 --grids 256}
part service 100 "$run" -m benchmarks.service --results gpu_service "${toy[@]}"
if [ "${#failed[@]}" != 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all parts ended; results are in $RESULTS_DIR"
