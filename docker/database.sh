#!/bin/sh
# Start PostgreSQL with a password that nobody has to choose: it is made at the first start, and kept
# in a volume that only the server and the workers have too. One that was set, by a variable or a
# secret file, is used instead.
set -eu
known=/run/losslab/pgpass # as PostgreSQL's clients read it: HOST:PORT:DATABASE:USER:PASSWORD

set_password() { # also in a database that was made with another one
    # Connections from inside this container need no password.
    until psql -q -h 127.0.0.1 -U losslab -d losslab -c "ALTER ROLE losslab PASSWORD '$1'" 2> /dev/null; do
        sleep 1
    done
}

if [ -z "${POSTGRES_PASSWORD:-}${POSTGRES_PASSWORD_FILE:-}" ]; then
    if [ ! -s "$known" ]; then
        secret=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
        (umask 077 && echo "*:*:*:losslab:$secret" > "$known.part")
        chown 10001:10001 "$known.part" # the user of server and workers
        mv "$known.part" "$known"
    fi
    POSTGRES_PASSWORD=$(cut -d: -f5 "$known")
    export POSTGRES_PASSWORD
    set_password "$POSTGRES_PASSWORD" &
fi
exec docker-entrypoint.sh postgres
