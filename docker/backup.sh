#!/usr/bin/env bash
# Save the database and all files of the running stack into a folder:
#
#     docker/backup.sh backups/monday [compose options, such as -f docker/compose.cpu.yml]
#
# Server and workers are stopped meanwhile (jobs are handed back), so that rows and files match.
# An older backup in the folder stays until the new one is complete.
set -euo pipefail
folder=$1
shift
. "$(dirname "$0")/standstill.sh"

umask 077
mkdir -p "$folder"
trap 'rm -f "$folder"/*.part; resume' EXIT
halt
database pg_dump -d losslab --format=custom > "$folder/database.dump.part"
files "tar --exclude=./cache --exclude=./.restored -c ." > "$folder/data.tar.part"
(cd "$folder" && sha256sum database.dump.part data.tar.part | sed 's/[.]part$//' > SHA256SUMS.part)
for name in SHA256SUMS database.dump data.tar; do
    mv "$folder/$name.part" "$folder/$name"
done
echo "saved to $folder"
