"""Routes for options: the built-in ones and those that users add."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlmodel import Session

from server.api.dependencies import EngineDep, SessionDep
from server.api.problems import PROBLEM_RESPONSES
from server.api.requests import OptionRequest
from server.api.schemas import OptionList, OptionPublic
from server.jobs import options
from server.models.names import EntityName

NewName = Annotated[EntityName, Path()]
Name = Annotated[str, Path(max_length=64)]

router = APIRouter(prefix="/options", tags=["options"], responses=PROBLEM_RESPONSES)


@router.get("")
def list_options(session: SessionDep) -> OptionList:
    """The built-in options, then your own by name, each with its whole configuration and its
    number of jobs."""
    counts = options.count_jobs(session)
    data = [
        OptionPublic.of(option, num_jobs=counts.get(name, 0))
        for name, option in options.read_options(session).items()
    ]
    return OptionList(data=data, has_more=False)


@router.get("/{name}")
def read_option(name: Name, *, session: SessionDep) -> OptionPublic:
    """An option with its whole configuration and the number of its jobs."""
    option = options.find_option(session, name)
    return OptionPublic.of(option, num_jobs=options.count_jobs_of(session, name))


@router.put(
    "/{name}",
    status_code=201,
    responses={200: {"description": "The same option was stored before", "model": OptionPublic}},
)
def add_option(
    name: NewName, *, request: OptionRequest, response: Response, engine: EngineDep
) -> OptionPublic:
    """Add an option of your own. It never changes: other settings under the same name are answered
    409. Only its summary can be replaced."""
    is_new = options.add_option(
        engine, name, base=request.base, config=request.settings, summary=request.summary
    )
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/options/{name}"
    with Session(engine) as session:
        return read_option(name, session=session)


@router.delete("/{name}", status_code=204)
def delete_option(name: Name, *, engine: EngineDep) -> None:
    """Delete an option of your own; refused while a study or another option names it. Its jobs
    stay as they are."""
    options.delete_option(engine, name)
