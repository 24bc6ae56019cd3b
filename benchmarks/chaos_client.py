"""The client of `benchmarks.chaos`: posts, pauses, resumes and cancels jobs, and asks again until
it was heard."""

import random
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

Json = dict[str, Any]

_ENDED: Final = ("succeeded", "failed", "cancelled")
_MAX_LIVE_JOBS: Final = 5
#: So that the disk holds them all, however fast the machine is.
MAX_JOBS_PER_MINUTE: Final = 40
_TIMEOUT_SECONDS: Final = 40.0
#: The jobs, which differ in what they keep; each runs once without a fault.
_JOBS: Final[dict[str, Json]] = {
    "each epoch": {"option": "b", "num_samples": 400, "epochs": 4, "checkpoint_every": 1},
    "last epoch": {"option": "a", "num_samples": 300, "epochs": 5, "checkpoint_every": 5},
    "every second": {"option": "c", "num_samples": 300, "epochs": 4, "checkpoint_every": 2},
}


@dataclass
class Posted:
    """A job that was accepted."""

    name: str
    job_id: str
    is_cancelled: bool = False  # this was asked for, so that it may end so
    status: str = ""


@dataclass(frozen=True)
class Answer:
    at: float
    method: str
    path: str
    status: int


@dataclass
class Client:
    """Runs in a thread of its own between `start` and `close`."""

    url: str
    seed: int
    jobs: list[Posted] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    num_keys: int = 0

    def __post_init__(self) -> None:
        self._choice = random.Random(self.seed)
        self._is_posting, self._is_open = True, True
        self._thread = threading.Thread(target=self._run, name="client")
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT_SECONDS)

    def run_references(self) -> dict[str, str]:
        """Run each kind of job once; returns their ids by name."""
        posted = {name: self._post(body) for name, body in _JOBS.items()}
        while any(self._read_status(job_id) not in _ENDED for job_id in posted.values()):
            time.sleep(0.2)
        return posted

    def start(self) -> None:
        self._started_at = time.monotonic()
        self._thread.start()

    def stop_posting(self) -> None:
        self._is_posting = False

    @property
    def has_ended(self) -> bool:
        """Whether every job has ended."""
        return not self._is_posting and all(job.status in _ENDED for job in self.jobs)

    def close(self) -> None:
        self._is_open = False
        self._thread.join(timeout=2 * _TIMEOUT_SECONDS)

    def _run(self) -> None:
        while self._is_open:
            live = [job for job in self.jobs if job.status not in _ENDED]
            if self._is_posting and len(live) < _MAX_LIVE_JOBS and self._is_within_rate:
                name = self._choice.choice(list(_JOBS))
                priority = self._choice.randint(0, 2)
                self.jobs.append(Posted(name, self._post(_JOBS[name] | {"priority": priority})))
            for job in live:
                job.status = self._read_status(job.job_id)
                self._steer(job)
            time.sleep(0.2)

    @property
    def _is_within_rate(self) -> bool:
        minutes = (time.monotonic() - self._started_at) / 60
        return len(self.jobs) < _MAX_LIVE_JOBS + MAX_JOBS_PER_MINUTE * minutes

    def _steer(self, job: Posted) -> None:
        if job.status == "paused":
            self._command(job, "resume")
        elif job.status == "running" and self._is_posting:
            chance = self._choice.random()
            if chance < 0.02:
                self._command(job, "pause")
            elif chance < 0.03:
                job.is_cancelled = True
                self._command(job, "cancel")

    def _command(self, job: Posted, command: str) -> None:
        """The job may have ended meanwhile, which is answered 409."""
        self._ask("POST", f"/jobs/{job.job_id}/{command}", allowed=(200, 409))

    def _post(self, body: Json) -> str:
        self.num_keys += 1
        headers = {"Idempotency-Key": str(uuid.UUID(int=self._choice.getrandbits(128)))}
        return str(self._ask("POST", "/jobs", allowed=(201,), json=body, headers=headers)["id"])

    def _read_status(self, job_id: str) -> str:
        return str(self._ask("GET", f"/jobs/{job_id}", allowed=(200,))["status"])

    def _ask(self, method: str, path: str, *, allowed: tuple[int, ...], **options: Any) -> Json:
        """Ask until there is an answer that is allowed; every answer is remembered."""
        while True:
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            known = Answer(time.monotonic(), method, path, answer.status_code)
            self.answers.append(known)
            if answer.status_code in allowed:
                body: Json = answer.json()
                return body
            time.sleep(0.2)
