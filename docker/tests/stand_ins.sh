#!/usr/bin/env bash
# Stand-ins for base images where no registry can be reached: Debian root file systems under the
# names that the Dockerfiles and the compose files use. Needs root, debootstrap and an engine.
#
#     stand_ins.sh PYTHON_IMAGE POSTGRES_IMAGE
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The mirror that this machine itself uses.
mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list* | head -1 | tr -d ' ')

bootstrap() {  # PACKAGES
    rm -rf "$work/root"
    debootstrap --variant=minbase --include="$1" bookworm "$work/root" "$mirror" > "$work/log" \
        || { tail -20 "$work/log"; exit 1; }
    rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/* \
        "$work"/root/usr/share/{doc,locale,man}
}

import() {  # NAME [docker import's options]
    local name=$1
    shift
    tar -C "$work/root" -c . | docker import "$@" - "$name"
}

is_missing() {
    ! docker image inspect "$1" > /dev/null 2>&1
}

if is_missing "$1"; then
    bootstrap python3,python3-venv,ca-certificates
    import "$1"
fi
if is_missing "$2"; then
    bootstrap postgresql
    rm -rf "$work/root/var/lib/postgresql"
    mkdir -p "$work/root/var/lib/postgresql/data"
    install -m 755 "$here/postgres_entrypoint.sh" "$work/root/usr/local/bin/"
    import "$2" --change 'ENTRYPOINT ["postgres_entrypoint.sh"]' \
        --change 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin'
fi
