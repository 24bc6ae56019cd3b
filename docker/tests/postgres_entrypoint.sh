#!/bin/sh
# Handles POSTGRES_USER, POSTGRES_PASSWORD(_FILE) and POSTGRES_DB like the official image.
set -eu
if [ -n "${POSTGRES_PASSWORD_FILE:-}" ]; then
    [ -z "${POSTGRES_PASSWORD:-}" ] || { echo "POSTGRES_PASSWORD and a file for it are exclusive" >&2; exit 1; }
    POSTGRES_PASSWORD=$(cat "$POSTGRES_PASSWORD_FILE")
fi
data=/var/lib/postgresql/data
as_postgres="setpriv --reuid postgres --regid postgres --init-groups"
chown postgres:postgres "$data"
chmod 700 "$data"
if [ ! -f "$data/PG_VERSION" ]; then
    umask 077
    printf '%s' "$POSTGRES_PASSWORD" > /tmp/password
    chown postgres /tmp/password
    $as_postgres initdb -D "$data" -U "$POSTGRES_USER" --pwfile=/tmp/password \
        --auth=trust -E UTF8 > /dev/null
    rm /tmp/password
    echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
    printf 'CREATE DATABASE "%s";' "$POSTGRES_DB" \
        | $as_postgres postgres --single -D "$data" postgres > /dev/null
fi
[ "$1" = postgres ]
exec $as_postgres postgres -D "$data" -c listen_addresses='*' -k /tmp
