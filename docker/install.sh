#!/bin/sh
# Install into /opt/losslab during an image's build:
#
#     install.sh dependencies [EXTRA]    the dependencies in pyproject.toml
#     install.sh package                 Losslab itself, after its dependencies
set -eu
pip="/opt/pip/bin/pip --python /opt/losslab/bin/python install --no-compile --no-cache-dir"
# pip must not see empty build arguments: it would use them as settings.
for name in PIP_NO_INDEX PIP_INDEX_URL; do
    [ -n "$(printenv "$name")" ] || unset "$name"
done

case $1 in
dependencies)
    python3 -m venv /opt/pip
    python3 -m venv --without-pip /opt/losslab
    if [ "${2:-}" = worker ]; then
        # PyTorch's index has only some of torch's dependencies; the next pip installs the others.
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
