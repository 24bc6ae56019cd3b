"""One stack with its images for all tests."""

from collections.abc import Iterator

import pytest
from stack import COMPOSE, SHORT, Stack, make_environment


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    stack = Stack(make_environment())
    stack.compose("down", "-v")
    # `docker compose` builds images in parallel by default, `docker-compose` only with the option.
    stack.compose("build", *([] if COMPOSE == ["docker", "compose"] else ["--parallel"]))
    seconds = stack.up()
    print(f"\nfrom up to ready: {seconds:.1f} s")
    try:
        yield stack
    finally:
        if request.session.testsfailed:
            print(stack.compose("logs", "--no-color", "--tail", "40"))
        stack.compose("down", "-v", "--remove-orphans")
        stack.http.close()


@pytest.fixture(scope="session")
def finished(stack: Stack) -> str:
    """A job that has run."""
    job_id = stack.post(name="first", **SHORT)
    assert stack.wait(job_id)["status"] == "succeeded"
    return job_id
