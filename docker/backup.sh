#!/usr/bin/env bash
# Save the database and all files of the running stack into a folder:
#
#     docker/backup.sh backups/monday [compose options, such as -f docker/compose.cpu.yml]
#
# Workers hand their jobs back meanwhile, so that rows and files belong together.
set -euo pipefail
folder=$1
shift
compose() { if docker compose version > /dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi; }

mkdir -p "$folder"
compose "$@" stop worker
trap 'compose "${options[@]}" start worker' EXIT
options=("$@")
compose "$@" exec -T db pg_dump -h 127.0.0.1 -U losslab -d losslab --format=custom > "$folder/database.dump"
compose "$@" exec -T server tar -C /data --exclude=./cache -c . > "$folder/data.tar"
echo "saved to $folder"
