# Sourced by backup.sh and restore.sh, with their compose options: nothing but the database runs
# from `halt` to `resume`.
options=("$@")
compose() {
    if docker compose version > /dev/null 2>&1; then
        docker compose "${options[@]}" "$@"
    else
        docker-compose "${options[@]}" "$@"
    fi
}
database() { compose exec -T -e PGHOST=127.0.0.1 -e PGUSER=losslab db "$@"; }
# A container beside the server's, so that files can be reached while the server stands still.
files() { compose run --rm --no-deps -T server sh -euc "cd /data; $1"; }

# Some composes also list what does not run.
running=$(docker ps -q --no-trunc | grep -Fx "$(compose ps -q)" || true)
services=$(compose config --services | grep -vx db)
halt() { compose stop $services; }
# The very containers, so that there are as many workers as before.
resume() { [ -z "$running" ] || docker start $running > /dev/null; }
