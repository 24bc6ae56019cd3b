"""Settings as people, editors, shells and container engines write them; and no secret in a text."""

import html
import io
import json
import logging
import os
import re
import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import forks
import pytest
from commands import assert_one_line, make_environment, run, wait_for
from conftest import open_client
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from test_events import find_free_port

from server import logs
from server.cli.processes import worker_environment
from server.cli.reporting import describe_error
from server.client import LosslabClient, RequestError
from server.database.engine import make_engine, open_database
from server.environment.database_url import make_sqlite_url
from server.environment.hosts import is_allowed, parse_allowed_hosts
from server.environment.variables import read_foreign_secrets, tidy
from server.errors import InvalidInputError
from server.main import create_app
from server.messages import forget_secrets, hide_secrets, redact
from server.settings import PrivateSettings, Settings, WorkerSettings
from worker.failures import describe_failure

#: What editors, shells and container engines add to a value.
ADDITIONS = ["{}\r", "{}\r\n", " {}", "{} ", "\t{}\n", "'{}'", '"{}"', ' "{}" \r', "\ufeff{}"]
TOKEN = "Zq9-marked-secret"
QUICK = settings(max_examples=150, deadline=None)


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """These settings in the environment, and no others; hypothesis allows no fixture for it."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("LOSSLAB_")]:
        del os.environ[name]
    os.environ.update({f"LOSSLAB_{name}": value for name, value in values.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def no_secrets_of_others() -> Iterator[None]:
    forget_secrets()
    yield
    forget_secrets()


def refuse(**values: str) -> str:
    """The one line that these variables are refused with."""
    with variables(**values), pytest.raises(ValidationError) as refused:
        Settings()
    line = describe_error(refused.value)
    assert "\n" not in line
    return line


# -- values as they were meant

EXAMPLES = {
    "DATA_DIR": ("/tmp/lab", Path("/tmp/lab")),
    "DATABASE_URL": ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
    "ALLOWED_HOSTS": ("lab.example.org", ("lab.example.org",)),
    "RATE_LIMIT": ("10/minute", "10/minute"),
    "REQUEST_SECONDS": ("2.5", 2.5),
    "MAX_STREAMS": ("7", 7),
    "TRUSTED_PROXIES": ("127.0.0.1, 172.16.0.0/12,[::1]", ("127.0.0.1", "172.16.0.0/12", "::1")),
    "PUBLISHED_HOST": ("0.0.0.0", "0.0.0.0"),
    "HOST": ("127.0.0.1", "127.0.0.1"),
    "PORT": ("8123", 8123),
    "ROOT_PATH": ("/losslab", "/losslab"),
    "WANDB_PROJECT": ("mine", "mine"),
    "JSON_LOGS": ("true", True),
}


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_was_added_to_a_value_is_taken_off(name: str, addition: str) -> None:
    value, meant = EXAMPLES[name]
    with variables(**{name: addition.format(value)}):
        assert getattr(Settings(), name.lower()) == meant


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("name", ["api_token", "database_password"])
def test_what_was_added_to_a_secret_is_taken_off(tmp_path: Path, name: str, addition: str) -> None:
    with variables(**{name.upper(): addition.format(TOKEN)}):
        assert getattr(Settings(), name).get_secret_value() == TOKEN
    (tmp_path / f"losslab_{name}").write_text(addition.format(TOKEN))
    with variables():
        read = Settings(_secrets_dir=tmp_path)  # type: ignore[call-arg]
    assert getattr(read, name).get_secret_value() == TOKEN


def test_every_setting_of_text_is_among_the_examples() -> None:
    """A new setting must be as robust as the others."""
    texts = {name for name, field in Settings.model_fields.items() if field.annotation is str}
    assert texts <= {name.lower() for name in EXAMPLES}


@pytest.mark.parametrize("nothing", ["", " ", "\r", "''", '""', ' "" \r\n'])
@pytest.mark.parametrize("name", [*EXAMPLES, "API_TOKEN", "API_TOKENS", "LEASE_SECONDS"])
def test_value_of_nothing_counts_as_not_set(name: str, nothing: str) -> None:
    with variables():
        default = Settings()
    with variables(**{name: nothing}):
        assert Settings() == default


def test_nothing_in_a_variable_does_not_hide_a_secret_file(tmp_path: Path) -> None:
    (tmp_path / "losslab_api_token").write_text(TOKEN)
    with variables(API_TOKEN=" \r"):
        read = Settings(_secrets_dir=tmp_path)  # type: ignore[call-arg]
    assert read.api_token.get_secret_value() == TOKEN


@given(st.text(), st.sampled_from(["", "\r", " ", "\n", "\t\r\n", "\ufeff"]))
def test_tidy_value_is_tidy(text: str, end: str) -> None:
    once = tidy(end + text + end)
    assert once == once.strip()
    assert len(once) <= len(text)
    if not set(text) & set("'\"\ufeff"):
        assert once == text.strip()


# -- somebody else's variables


def test_variables_of_a_kubernetes_service_are_passed_over() -> None:
    service = {
        "PORT": "tcp://10.96.0.12:8000",
        "SERVICE_HOST": "10.96.0.12",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT_8000_TCP": "tcp://10.96.0.12:8000",
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.96.0.12",
    }
    with variables(**service):
        assert Settings() == Settings(port=8000)


def test_port_that_is_none_is_still_refused() -> None:
    assert refuse(PORT="https://10.96.0.12").startswith("LOSSLAB_PORT: ")


WRONG = {
    "API_TOKEN": "with blanks in it",
    "API_TOKENS": "nonsense",
    "ALLOWED_HOSTS": "a/b",
    "RATE_LIMIT": "many",
    "REQUEST_SECONDS": "-1",
    "MAX_STREAMS": "0",
    "TRUSTED_PROXIES": "*",
    "HEADER_SECONDS": "0",
    "SEND_SECONDS": "x",
    "PORT": "x",
    "ROOT_PATH": "https://lab.example.org/x",
    "MAX_QUEUED_JOBS": "0",
    "MAX_UPLOAD_BYTES": "x",
}


@pytest.mark.parametrize("name", WRONG)
def test_mistake_in_a_setting_stops_only_those_who_use_it(name: str) -> None:
    assert refuse(**{name: WRONG[name]}).startswith(f"LOSSLAB_{name}: ")
    with variables(**{name: WRONG[name]}):
        assert WorkerSettings() == WorkerSettings.model_validate({})


@pytest.mark.parametrize("name", ["LEASE_SECONDS", "POLL_SECONDS", "NUM_WORKERS", "DATABASE_URL"])
def test_mistake_in_a_setting_of_workers_stops_them(name: str) -> None:
    with variables(**{name: "x"}), pytest.raises(ValidationError, match=r"number|read"):
        WorkerSettings()


def test_worker_runs_in_spite_of_the_servers_mistakes(tmp_path: Path) -> None:
    wrong = {f"LOSSLAB_{name}": value for name, value in WRONG.items()}
    environment = make_environment(LOSSLAB_DATA_DIR=str(tmp_path), **wrong)
    done = forks.run("worker", "--drain", environment=environment)
    assert done.returncode == 0, done.stderr


# -- paths


@pytest.mark.parametrize("given_path", ["~/lab", " ~/lab\r", "'~/lab'"])
def test_home_folder_stands_for_its_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given_path: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with variables(DATA_DIR=given_path, DATABASE_URL="sqlite:///~/db/x.db"):
        read = Settings()
    assert read.data_dir == tmp_path / "lab"
    assert read.resolved_database_url == f"sqlite:///{tmp_path}/db/x.db"
    assert Settings(data_dir=Path("~/lab")).data_dir == tmp_path / "lab"


def test_home_folder_of_nobody_is_refused() -> None:
    assert "~" in refuse(DATA_DIR="~no-such-user-here/lab")
    assert "~" in refuse(DATABASE_URL="sqlite:///~no-such-user-here/x.db")


def test_home_folder_stands_for_its_sign_in_files_of_commands(tmp_path: Path) -> None:
    """Shells leave the ~ of --log=~/x as it is. The paths are checked first: nobody answers."""
    (tmp_path / "home").mkdir()
    nobody = f"http://127.0.0.1:{find_free_port()}"
    for arguments in (
        ["compare", "--options", "a,b", "--report=~/none/x.html"],
        ["study", "report", "abc", "--output=~/none/x.html"],
        ["train", "--option", "b", "--log=~/none/x.log", f"--data-dir={tmp_path / 'lab'}"],
    ):
        done = run(*arguments, HOME=str(tmp_path / "home"), LOSSLAB_URL=nobody)
        told = " ".join(done.stderr.replace("│", "").split())
        assert done.returncode == 2, told
        assert str(tmp_path / "home" / "none") in told.replace(" ", "").replace("-\n", ""), told


# -- database URLs


@pytest.mark.parametrize(
    ("given_url", "resolved"),
    [
        ("postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("POSTGRESQL://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres+pg8000://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+asyncpg://u@h/d?ssl=require", "postgresql+psycopg://u@h/d?sslmode=require"),
        ("postgresql://u@/d?host=/var/run", "postgresql+psycopg://u@/d?host=%2Fvar%2Frun"),
        ("postgresql://u:p%40%2Fq@[::1]:5432/d", "postgresql+psycopg://u:p%40%2Fq@[::1]:5432/d"),
        ("postgresql://u:a/b:c#d@h/d", "postgresql+psycopg://u:a%2Fb%3Ac%23d@h/d"),
        ("sqlite+aiosqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("sqlite+pysqlite:///x.db", "sqlite:///x.db"),
        ("sqlite:////tmp/x.db\r", "sqlite:////tmp/x.db"),
        ("sqlite:////tmp/a@b:c.db", "sqlite:////tmp/a%40b%3Ac.db"),
    ],
)
def test_database_url_of_any_driver_is_understood(given_url: str, resolved: str) -> None:
    with variables(DATABASE_URL=given_url):
        assert Settings().resolved_database_url == resolved


@pytest.mark.parametrize(
    ("given_url", "words"),
    [
        ("mysql+pymysql://u:{}@h/d", "must read postgresql://"),
        ("jdbc:postgresql://h/d?password={}", "must read postgresql://"),
        ("{}", "must read postgresql://"),
        ("host=h password={}", "must read postgresql://"),
        ("postgresql://u:{}@more@h:5432/d", "write @ as %40"),
        ("postgresql://u:x@{}/more@h/d", "write @ as %40"),
        ("postgresql://u:x@{}?more@h/d", "write @ as %40"),
        ("postgresql://u:{}/d", "write @ as %40"),
        ("postgresql://u:{}@h:port/d", "write @ as %40"),
        ("postgresql://u:{}@h/d d", "white space"),
        ("sqlite://{}", "three slashes"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("sqlite:////tmp/{}.db?timeout=abc", "no parameters"),
        ("sqlite:////tmp/{}.db?mode=ro", "no parameters"),
        ("sqlite:////tmp/{}.db?cache=bogus&uri=true", "no parameters"),
        ("sqlite:////tmp/{}%00.db", "control character"),
        ("postgresql://u:{}%00x@127.0.0.1:1/d", "control character"),
        ("postgresql://u%0A:{}@127.0.0.1:1/d", "control character"),
        ("postgresql://u:{}@127.0.0.1:1/d%1b", "control character"),
        ("postgresql://u:{}@127.0.0.1:1/d?sslmode=disable%00", "control character"),
    ],
)
def test_database_url_that_cannot_work_is_refused_without_a_part_of_it(
    given_url: str, words: str
) -> None:
    line = refuse(DATABASE_URL=given_url.format(TOKEN))
    assert line.startswith("LOSSLAB_DATABASE_URL: ")
    assert words in line
    assert TOKEN not in line
    assert "more" not in line


@pytest.mark.parametrize("query", [f"plugin={TOKEN}", f"port={TOKEN}"])
def test_database_url_that_the_driver_refuses_is_an_error_without_a_part_of_it(query: str) -> None:
    with pytest.raises(InvalidInputError, match="LOSSLAB_DATABASE_URL has a parameter") as refused:
        make_engine(Settings(database_url=f"postgresql://u:{TOKEN}@h/d?{query}"))
    assert TOKEN not in str(refused.value)


def test_password_of_the_database_has_no_control_character() -> None:
    """PostgreSQL's library would read up to the NUL, and connect elsewhere."""
    with pytest.raises(ValidationError, match="control character"):
        Settings(database_password=SecretStr("before\0after"))


def mark(text: str) -> str:
    """A secret that is no word of a message: Hypothesis also tries the words of the code."""
    return f"{text}Qz7"


@QUICK
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=5).map(mark), st.text())
@example("Qz7first@Wx9second", "")
@example("first/second", "")
@example("first:8000/second", "")
def test_password_in_a_url_is_read_whole_or_not_at_all(password: str, user: str) -> None:
    """As it is, or encoded: never is a part of it taken for a host or a name."""
    for written in (password, quote(password, safe="")):
        with variables(DATABASE_URL=f"postgresql://{quote(user, safe='')}:{written}@h:5432/d"):
            try:
                read = Settings()
            except ValidationError as error:
                assert password not in describe_error(error)
                continue
        assert re.fullmatch(
            r"postgresql\+psycopg://.*@h:5432/d", read.resolved_database_url, re.DOTALL
        )


@pytest.mark.parametrize("name", ["a b", "a?b", "100%", "%41", "a@b:c", "#1", "ä", "a'b", "[x]"])
@pytest.mark.parametrize("is_given", [True, False])
def test_database_lies_in_a_folder_of_any_name(tmp_path: Path, name: str, is_given: bool) -> None:
    folder = tmp_path / name
    url = make_sqlite_url(folder / "losslab.db") if is_given else ""
    open_database(Settings(data_dir=folder, database_url=url)).dispose()
    assert (folder / "losslab.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


# -- tokens


@pytest.mark.parametrize(
    "token",
    ["pässword–tok", "two words", "a\tb", "a\nb", "a\x00b", "a\x7fb", "\u200bx", "x" * 3000],
)
def test_token_that_no_header_carries_is_refused_at_the_start(tmp_path: Path, token: str) -> None:
    if "\0" not in token:  # which no variable can have
        line = refuse(API_TOKEN=token)
        assert line.startswith("LOSSLAB_API_TOKEN: must have printable ASCII letters")
        assert token not in line
    (tmp_path / "losslab_api_token").write_text(token)
    with variables(), pytest.raises(ValidationError) as refused:
        Settings(_secrets_dir=tmp_path)  # type: ignore[call-arg]
    assert describe_error(refused.value).startswith("LOSSLAB_API_TOKEN: ")
    with pytest.raises(RequestError, match="LOSSLAB_API_TOKEN") as told:
        LosslabClient("http://127.0.0.1:9", token=token)
    assert token not in str(told.value)


def test_secret_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "losslab_api_token").write_bytes(b"\xff\xfe" + TOKEN.encode("utf-16-le"))
    with variables(), pytest.raises(ValidationError) as refused:
        Settings(_secrets_dir=tmp_path)  # type: ignore[call-arg]
    assert describe_error(refused.value).startswith("LOSSLAB_API_TOKEN: ")


# -- host names


@pytest.mark.parametrize(
    ("configured", "asked"),
    [
        ("Lab.Example.ORG", "lab.example.org"),
        ("lab.example.org:8443", "lab.example.org"),
        ("https://lab.example.org", "lab.example.org"),
        ("https://lab.example.org:8443/", "LAB.example.org"),
        ("lab.example.org.", "lab.example.org"),
        ("lab.example.org", "lab.example.org."),
        ("*.example.net", "one.example.net"),
        ("*.Example.net:80", "a.b.example.net"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("my_service", "my_service"),
        ("10.0.0.7:8000", "10.0.0.7"),
        ("[2001:DB8::1]:8000", "2001:db8::1"),
        ("2001:db8:0::1", "2001:db8::1"),
        ("other.example, lab.example.org lab.example.org", "lab.example.org"),
    ],
)  # fmt: skip
def test_host_is_allowed_however_it_is_written(configured: str, asked: str) -> None:
    with variables(ALLOWED_HOSTS=configured):
        allowed = Settings().allowed_hosts
    assert is_allowed(asked, allowed=allowed)
    assert len(set(allowed)) == len(allowed)
    for own in ("localhost", "LOCALHOST", "127.0.0.1", "::1"):
        assert is_allowed(own, allowed=allowed)
    for foreign in ("evil.example", "example.net", "example.net.evil.example", "xexample.net"):
        assert not is_allowed(foreign, allowed=allowed)


@pytest.mark.parametrize(
    "configured",
    ["*", "**.example.org", "a*.example.org", "a/b", "a@b", "-x", "x:y", "a..b", "[::1"],
)
def test_host_that_is_none_is_refused_at_the_start(configured: str) -> None:
    assert refuse(ALLOWED_HOSTS=f"lab.example.org,{configured}").startswith("LOSSLAB_ALLOWED_HOSTS")


@given(st.lists(st.text(max_size=40), max_size=5))
def test_allowed_hosts_are_normal_or_refused(entries: list[str]) -> None:
    try:
        names = parse_allowed_hosts(entries)
    except ValueError:
        return
    assert parse_allowed_hosts(names) == names
    assert all(name == name.lower() and name.isascii() for name in names)


@pytest.mark.parametrize(
    ("host", "meant", "is_guarded"),
    [
        ("[::1]", "::1", True),
        ("LOCALHOST", "localhost", True),
        ("localhost.", "localhost", True),
        ("0.0.0.0", "0.0.0.0", False),
        ("fe80::1%eth0", "fe80::1%eth0", False),
        ("Lab_1.example.org", "lab_1.example.org", False),
    ],
)
def test_listening_host_is_normal(host: str, meant: str, is_guarded: bool) -> None:
    with variables(HOST=host):
        read = Settings()
    assert (read.host, read.is_guarded) == (meant, is_guarded)


@pytest.mark.parametrize("name", ["HOST", "PUBLISHED_HOST"])
@pytest.mark.parametrize(
    "host",
    [
        "http://127.0.0.1",
        "127.0.0.1:8000",
        "[::1]:8000",
        "lab example",
        "*.example.org",
        "*",
        "a/b",
    ],
)
def test_listening_host_that_is_none_is_refused_by_its_name(name: str, host: str) -> None:
    assert refuse(**{name: host}).startswith(
        f"LOSSLAB_{name}: must be an address such as 127.0.0.1"
    )


@pytest.mark.parametrize(
    ("name", "given_number", "words"),
    [
        ("MAX_UPLOAD_BYTES", "256MiB", "a whole number without a unit, such as 268435456"),
        ("JOBS_PER_WORKER", "8x", "a whole number without a unit, such as 1"),
        ("LEASE_SECONDS", "30s", "a number without a unit, such as 30"),
        ("LEASE_SECONDS", "nan", "a number without a unit, such as 30"),
        ("POLL_SECONDS", "inf", "a number without a unit, such as 0.2"),
        ("MAX_STREAMS", "1.5", "a whole number without a unit, such as 512"),
        ("NUM_WORKERS", "auto", "a whole number without a unit, such as 1"),
    ],
)
def test_number_that_is_none_is_refused_with_an_example(
    name: str, given_number: str, words: str
) -> None:
    assert refuse(**{name: given_number}) == f"LOSSLAB_{name}: must be {words}"


@pytest.mark.parametrize(
    ("given_path", "meant"),
    [("/losslab", "/losslab"), ("losslab/", "/losslab"), ("/", ""), ("/user/a%40b/proxy/8000/",
      "/user/a%40b/proxy/8000")],
)  # fmt: skip
def test_root_path_is_normal(given_path: str, meant: str) -> None:
    with variables(ROOT_PATH=given_path):
        assert Settings().root_path == meant


@pytest.mark.parametrize(
    "given_path", ["https://x/y", "a b", "/a/../b", "/a//b", "/a?b", "/<a>", "/.", "/lo%zz", "/a%2"]
)
def test_root_path_that_is_none_is_refused(given_path: str) -> None:
    assert refuse(ROOT_PATH=given_path).startswith("LOSSLAB_ROOT_PATH: must be a path")


def test_messages_of_settings_have_no_regular_expression() -> None:
    for name in Settings.model_fields:
        with variables(**{name.upper(): "\N{SNOWMAN}?"}):
            try:
                Settings()
            except ValidationError as error:
                line = describe_error(error)
                assert line.startswith(f"LOSSLAB_{name.upper()}: ")
                assert "pattern" not in line
                assert "\N{SNOWMAN}" not in line


# -- a server of this command's own


NUMBERS = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if field.annotation in (int, float)
}


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "-inf", "9" * 40, "-1", "١٠x"])
@pytest.mark.parametrize("name", NUMBERS)
def test_number_that_no_timer_or_column_holds_is_refused(name: str, value: str) -> None:
    assert refuse(**{name.upper(): value}).startswith(f"LOSSLAB_{name.upper()}: ")


@QUICK
@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_every_number_that_is_taken_fits(name: str, data: st.DataObject) -> None:
    kind = NUMBERS[name]
    value = data.draw(st.floats() if kind is float else st.integers())
    with variables(**{name.upper(): str(value)}):
        try:
            taken = getattr(Settings(), name)
        except ValidationError:
            return
    if kind is float:
        timedelta(seconds=taken)
        assert taken < threading.TIMEOUT_MAX
    else:
        assert 0 <= taken < 2**63


def test_private_server_takes_nothing_of_a_public_one() -> None:
    public = {
        "API_TOKEN": "x",
        "TRUSTED_PROXIES": "10.0.0.1",
        "API_TOKENS": f"anna:full:{'0' * 64}",
        "ALLOWED_HOSTS": "lab.example.org",
        "PUBLISHED_HOST": "0.0.0.0",
        "HOST": "0.0.0.0",
        "PORT": "8123",
        "ROOT_PATH": "/losslab",
        "RATE_LIMIT": "1/hour",
        "MAX_QUEUED_JOBS": "1",
        "MAX_JOB_SECONDS": "1",
        "MAX_STORAGE_BYTES": "1",
        "MAX_UPLOAD_BYTES": "1",
        "MAX_STREAMS": "1",
        "DATABASE_URL": "postgresql://shared/x",
        "DATABASE_PASSWORD": TOKEN,
        "REQUEST_SECONDS": "0.001",
        "HEADER_SECONDS": "0.001",
        "SEND_SECONDS": "0.001",
    }
    with variables():
        default = PrivateSettings()
    with variables(**public):
        private = PrivateSettings()
        environment = worker_environment(private)
    assert private == default
    assert private.is_guarded
    # Its workers read the environment again.
    assert environment["LOSSLAB_DATABASE_URL"] == private.resolved_database_url
    assert float(environment["LOSSLAB_MAX_JOB_SECONDS"]) == 0
    assert set(public) == {name.upper() for name in PrivateSettings.unused}


# -- no secret in a text


def list_forms(secret: str) -> list[str]:
    """How the messages of libraries quote what they were given."""
    return [
        secret,
        repr(secret),
        ascii(secret),
        repr(secret.encode()),
        json.dumps({"x": secret}),
        json.dumps(secret, ensure_ascii=False),
        quote(secret, safe=""),
        quote(secret),
        html.escape(secret),
        f"Illegal header value {b'Bearer ' + secret.encode()!r}",
        f"failed to resolve host '{secret}@127.0.0.1'",
        f"postgresql://u:{quote(secret, safe='')}@h/d",
    ]


secrets = st.text(
    st.characters(exclude_categories=["C", "Z"], max_codepoint=0x2FFF), min_size=5, max_size=37
).map(mark)


@QUICK
@given(secrets)
@example("Qz7first@Wx9second")
@example("a\"b'c\\d<e>&f")
def test_no_form_of_a_secret_is_left_in_a_text(secret: str) -> None:
    forget_secrets()
    hide_secrets([secret])
    for form in list_forms(secret):
        shown = redact(f"before {form} after")
        assert secret not in shown
        assert form not in shown
        assert shown.startswith("before ")
        assert shown.endswith(" after")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY", "PGPASSWORD"])
def test_secrets_of_other_programs_are_hidden_too(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    secret = "p%40ss-" + TOKEN
    monkeypatch.setenv(name, secret if name == "PGPASSWORD" else f" http://u:{secret}@proxy:3128\r")
    hide_secrets(read_foreign_secrets())
    assert TOKEN not in redact(f"ProxyError: http://u:{secret}@proxy:3128 refused")
    if name != "PGPASSWORD":
        assert TOKEN not in redact(f"CONNECT with u:p@ss-{TOKEN}")


def test_common_words_stay_though_they_are_passwords() -> None:
    hide_secrets(["losslab", "abc", "1234"])
    line = "losslab.access: GET /jobs/12345 abc"
    assert redact(line) == line
    assert redact("password=1234") == "password=***"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "API_TOKEN": secrets,
            "API_TOKENS": secrets,
            "DATABASE_PASSWORD": secrets,
            "DATABASE_URL": secrets.flatmap(
                lambda secret: st.sampled_from([
                    f"postgresql://u:{quote(secret, safe='')}@h/d",
                    f"postgresql://u:{secret}@h/d",
                    f"postgresql://u@h/d?password={quote(secret, safe='')}",
                    f"mysql://u:{secret}@h/d",
                    secret,
                ])
            ),
            "PORT": st.just("x"),
            "RATE_LIMIT": st.just("x"),
        },
    ),
    st.sampled_from(ADDITIONS),
)  # fmt: skip
def test_settings_show_no_secret(values: dict[str, str], addition: str) -> None:
    """Whether they are read or refused: in messages, tracebacks, their own text, and logs."""
    forget_secrets()
    given_secrets = [value for name, value in values.items() if name not in ("PORT", "RATE_LIMIT")]
    secret_parts = [part for value in given_secrets for part in find_secret(value)]
    with variables(**{name: addition.format(value) for name, value in values.items()}):
        try:
            read = Settings()
        except ValidationError as error:
            texts = [str(error), repr(error), describe_error(error)]
        else:
            hide_secrets(read.secrets)
            texts = [repr(read), str(read), log(f"opening {read.resolved_database_url}")]
            secret = read.api_token.get_secret_value()
            texts += [log(f"Illegal header value {secret!r}")] if secret else []
    for text in texts:
        assert not [part for part in secret_parts if part in text], text


def find_secret(value: str) -> list[str]:
    """The secret in a value as it may show: encoded or not."""
    match = re.search(r"(?:u:|password=)(.*?)(?:@h/d)?$", value, re.DOTALL)
    inner = match[1] if match and "://" in value else value
    return [inner]


def log(message: str) -> str:
    """What is logged of an error with this message, as lines and as JSON."""
    stream = io.StringIO()
    logger = logging.Logger("losslab.test")
    for formatter in (logs.LineFormatter("%(message)s"), logs.JsonFormatter()):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    try:
        raise OSError(message)
    except OSError as error:
        logger.exception("it broke: %s", error)
    return stream.getvalue()


def test_answers_pages_and_stored_failures_show_no_secret(app: FastAPI) -> None:
    hide_secrets([TOKEN])

    @app.get("/ui/break")
    @app.get("/break")
    def fail() -> None:
        from fastapi import HTTPException  # noqa: PLC0415

        raise HTTPException(400, f"the password {TOKEN} is wrong")

    with open_client(app) as client:
        for path in ("/break", "/ui/break"):
            answer = client.get(path)
            assert answer.status_code == 400
            assert "is wrong" in answer.text
            assert TOKEN not in answer.text
    error = RuntimeError(f"connection to postgresql://u:{TOKEN}@h failed")
    failure = describe_failure(error, job=None)  # type: ignore[arg-type] # which it does not need
    assert TOKEN not in failure.message
    assert "connection to" in failure.message


#: Ways in which commands fail, each with secrets in all places; {} is a port where nobody listens.
FAILURES = {
    "a parameter that the driver does not know": (
        ["worker", "--check"],
        {"DATABASE_URL": f"postgresql://u:{TOKEN}@127.0.0.1:{{}}/d?unknown=1"},
    ),
    "an @ in a password": (
        ["serve", "--port", "0"],
        {"DATABASE_URL": f"postgresql://u:{TOKEN}@{TOKEN}@127.0.0.1:{{}}/d"},
    ),
    "a token with a letter beyond ASCII": (
        ["serve", "--port", "0"],
        {"API_TOKEN": f"{TOKEN}–"},
    ),
    "a client's token with one": (["jobs"], {"API_TOKEN": f"{TOKEN}–"}),
    "a client's token with a line in it": (["jobs"], {"API_TOKEN": f"{TOKEN}\r\nx"}),
    "a password in the client's URL": (
        ["jobs"],
        {"URL": f"http://u:{TOKEN}@127.0.0.1:{{}}", "API_TOKEN": TOKEN},
    ),
    "a client's URL that is none": (["jobs"], {"URL": f"u:{TOKEN}@127.0.0.1"}),
    "a secret in the wrong place": (["serve"], {"API_TOKENS": TOKEN}),
    "an address that this machine has not": (
        ["serve", "--host", "192.0.2.1"],
        {"API_TOKEN": TOKEN, "DATABASE_PASSWORD": TOKEN},
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_command_that_fails_shows_no_secret(tmp_path: Path, what: str) -> None:
    arguments, values = FAILURES[what]
    port = str(find_free_port())
    given = {f"LOSSLAB_{name}": value.replace("{}", port) for name, value in values.items()}
    done = run(*arguments, LOSSLAB_DATA_DIR=str(tmp_path / "lab"), **given)
    assert done.returncode not in (0, -1), done.stdout
    assert "Traceback" not in done.stderr
    files = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for text in (done.stdout, done.stderr, *files):
        assert TOKEN not in text
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "url", [f"postgresql://u:{TOKEN}@127.0.0.1:{{}}/d", "postgresql://u@127.0.0.1:{}/d"]
)
def test_service_that_waits_for_its_database_shows_no_secret(tmp_path: Path, url: str) -> None:
    log_path = tmp_path / "log"
    environment = make_environment(
        LOSSLAB_DATA_DIR=str(tmp_path / "lab"),
        LOSSLAB_DATABASE_URL=url.format(find_free_port()),
        LOSSLAB_DATABASE_PASSWORD=TOKEN,
    )
    with (
        log_path.open("w") as log,
        forks.start(
            "losslab", "serve", "--port", "0", environment=environment, stdout=log, stderr=log
        ) as process,
    ):
        wait_for(lambda: "waiting for it" in log_path.read_text() or process.poll() is not None)
        process.terminate()
    files = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert "the database is not there; waiting for it" in log_path.read_text()
    assert not any(TOKEN in text for text in files)


def test_worker_that_fails_shows_no_secret(tmp_path: Path) -> None:
    """One that finds its settings by itself."""
    environment = make_environment(
        LOSSLAB_DATA_DIR=str(tmp_path),
        LOSSLAB_DATABASE_URL=f"postgresql://u:{TOKEN}@{TOKEN}@127.0.0.1:1/d",
    )
    done = forks.run("worker", environment=environment)
    assert_one_line(done, code=1, words="LOSSLAB_DATABASE_URL: cannot be read")
    assert TOKEN not in done.stdout + done.stderr


def test_bug_of_the_command_line_is_shown_without_secrets(tmp_path: Path) -> None:
    """A traceback quotes what it was given."""
    code = (
        "import sys; sys.argv = ['losslab', 'jobs']; from server.cli import main; "
        "from server.client import LosslabClient; "
        "LosslabClient.list_jobs = lambda *a, **k: 1 / len([]) if a else None; "
        "from server import client; "
        f"client.LosslabClient.list_jobs = lambda *a, **k: [][{TOKEN!r}]; main.app()"
    )
    environment = make_environment(LOSSLAB_API_TOKEN=TOKEN)
    done = forks.subprocess.run(
        [forks.sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert TOKEN not in done.stderr


def test_alphabet_of_made_tokens_is_allowed() -> None:
    with variables(API_TOKEN=string.ascii_letters + string.digits + "-._~+/="):
        assert Settings().tokens


def test_server_with_a_tidied_token_takes_it(tmp_path: Path) -> None:
    with variables(API_TOKEN=f"'{TOKEN}'\r", DATA_DIR=str(tmp_path)):
        app = create_app(Settings())
    with open_client(app) as client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/jobs", headers=headers).status_code == 200
