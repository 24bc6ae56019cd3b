# Sourced by backup.sh and restore.sh with their compose options. Between `halt` and `resume` only
# the database runs.
options=("$@")
compose() {
    if docker compose version > /dev/null 2>&1; then
        docker compose "${options[@]}" "$@"
    else
        docker-compose "${options[@]}" "$@"
    fi
}
database() { compose exec -T -e PGHOST=127.0.0.1 -e PGUSER=losslab db "$@"; }
# A separate container, which can access the files while the server is stopped.
files() { compose run --rm --no-deps -T server sh -euc "cd /data; $1"; }

# Some versions of compose also list stopped containers.
running=$(docker ps -q --no-trunc | grep -Fx "$(compose ps -q)" || true)
services=$(compose config --services | grep -vx db)
halt() { compose stop $services; }
# Starts the same containers, and so the same number of workers as before.
resume() { [ -z "$running" ] || docker start $running > /dev/null; }
