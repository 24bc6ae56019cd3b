#!/usr/bin/env bash
# Stand-ins for base images if no registry can be reached: Debian root file systems with the image
# names in the Dockerfiles and compose files. Needs root, debootstrap and a container engine.
#
#     stand_ins.sh PYTHON_IMAGE POSTGRES_IMAGE
set -euo pipefail
is_missing() {
    ! docker image inspect "$1" > /dev/null 2>&1
}

is_missing "$1" || is_missing "$2" || exit 0

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
root=$work/root
trap 'rm -rf "$work"' EXIT
# This machine's own mirror.
mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list* | head -1 | tr -d ' ')

import() {  # NAME [docker import's options]
    local name=$1
    shift
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man}
    tar -C "$root" -c . | docker import "$@" - "$name"
}

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$root" "$mirror" > "$work/log" || { tail -20 "$work/log"; exit 1; }
if is_missing "$1"; then
    import "$1"
fi
if is_missing "$2"; then
    # Add PostgreSQL to the same tree: a second bootstrap would take four times as long.
    cp /etc/resolv.conf "$root/etc/"
    chroot "$root" sh -euc 'export DEBIAN_FRONTEND=noninteractive
        apt-get update -q && apt-get install -qy --no-install-recommends postgresql' \
        > "$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
    rm -rf "$root/var/lib/postgresql" "$root/etc/resolv.conf"
    mkdir -p "$root/var/lib/postgresql/data"
    install -m 755 "$here/postgres_entrypoint.sh" "$root/usr/local/bin/docker-entrypoint.sh"
    import "$2" --change 'ENTRYPOINT ["docker-entrypoint.sh"]' \
        --change 'ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin'
fi
