#!/usr/bin/env bash
# Restore a backup of docker/backup.sh; the stack's current data is lost:
#
#     docker/restore.sh backups/monday [compose options, such as -f docker/compose.cpu.yml]
#
# The current data is deleted only after the backup is completely unpacked next to it, so the disk
# needs space for both.
set -euo pipefail
folder=$1
shift
[ -f "$folder/database.dump" ] && [ -f "$folder/data.tar" ] || { echo "no backup in $folder" >&2; exit 1; }
if [ -f "$folder/SHA256SUMS" ]; then
    (cd "$folder" && sha256sum --check --quiet SHA256SUMS)
fi
. "$(dirname "$0")/standstill.sh"

compose up -d --no-recreate db
for _ in $(seq 60); do
    database pg_isready -q -d losslab && break
    sleep 1
done
clear_away() {
    database dropdb --if-exists --force losslab_restored
    files "rm -rf .restored"
}
trap 'clear_away || true; resume' EXIT
clear_away
database createdb losslab_restored
database pg_restore -d losslab_restored --no-owner --exit-on-error < "$folder/database.dump"
files "mkdir .restored; tar -C .restored -x" < "$folder/data.tar"

# From here on only the backup is complete. After any failure, run the same command again.
trap resume EXIT
halt
database dropdb --if-exists --force losslab
database psql -q -d postgres -c "ALTER DATABASE losslab_restored RENAME TO losslab"
files "find . -mindepth 1 -maxdepth 1 ! -name .restored -exec rm -rf {} +
    find .restored -mindepth 1 -maxdepth 1 -exec mv -t . {} +
    rmdir .restored"
[ -n "$running" ] || compose up -d
echo "restored from $folder"
