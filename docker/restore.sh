#!/usr/bin/env bash
# Put back what docker/backup.sh saved; what the stack holds now is lost:
#
#     docker/restore.sh backups/monday [compose options, such as -f docker/compose.cpu.yml]
set -euo pipefail
folder=$1
shift
compose() { if docker compose version > /dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi; }
[ -f "$folder/database.dump" ] && [ -f "$folder/data.tar" ] || { echo "no backup in $folder" >&2; exit 1; }

compose "$@" stop worker server
compose "$@" up -d db
until compose "$@" exec -T db pg_isready -q -h 127.0.0.1 -U losslab; do sleep 1; done
compose "$@" exec -T db sh -c \
    "dropdb -h 127.0.0.1 -U losslab --if-exists --maintenance-db=postgres losslab \
    && createdb -h 127.0.0.1 -U losslab --maintenance-db=postgres losslab"
compose "$@" exec -T db pg_restore -h 127.0.0.1 -U losslab -d losslab --no-owner < "$folder/database.dump"
compose "$@" run --rm --no-deps -T server \
    sh -c 'find /data -mindepth 1 -delete && tar -C /data -x' < "$folder/data.tar"
compose "$@" up -d
echo "restored from $folder"
