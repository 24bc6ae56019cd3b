#!/bin/sh
# Install into /opt/losslab, within an image's build:
#
#     install.sh dependencies [EXTRA]    what pyproject.toml asks for
#     install.sh package                 Losslab itself, once those are there
set -eu
pip="/opt/pip/bin/pip --python /opt/losslab/bin/python install --no-compile --no-cache-dir"
# Empty arguments of the build must not reach pip: it would take them for a setting.
for name in PIP_NO_INDEX PIP_INDEX_URL; do
    [ -n "$(printenv "$name")" ] || unset "$name"
done

case $1 in
dependencies)
    python3 -m venv /opt/pip
    python3 -m venv --without-pip /opt/losslab
    if [ "${2:-}" = worker ]; then
        # PyTorch's own index mirrors but some of what torch needs: the next pip brings the rest.
        $pip ${TORCH_INDEX_URL:+--no-deps --index-url "$TORCH_INDEX_URL"} torch
    fi
    python3 - "${2:-}" > /tmp/requirements.txt << 'END'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"].get(sys.argv[1], [])))
END
    $pip -r /tmp/requirements.txt
    ;;
package)
    $pip --no-deps .
    ;;
esac
