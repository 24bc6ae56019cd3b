"""Routes for data sets: upload, list, inspect, delete."""

import asyncio
import hashlib
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request, Response
from sqlmodel import Session, col, select

from server.api.addresses import locate
from server.api.caching import NOT_MODIFIED, is_known
from server.api.dependencies import EngineDep, SettingsDep
from server.api.limits import extend_deadline
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import MAX_PAGE_SIZE
from server.api.schemas import DatasetDetails, DatasetList, DatasetPublic, OverlapPublic
from server.database.engine import write_transaction
from server.errors import ConflictError, NotFoundError, TooLargeError
from server.files.datasets import (
    DatasetContents,
    DatasetError,
    admit_upload,
    draw_preview,
    find_npz,
    list_npz,
    open_upload,
    read_contents,
)
from server.jobs import studies
from server.jobs.retention import ensure_space
from server.models.configuration import BuiltInDataset
from server.models.options import NAME_PATTERN
from server.models.tables import TERMINAL_STATUSES, Job
from server.settings import Settings

# The real limit is a setting, and is checked while the body arrives.
_MAX_BODY_BYTES: Final = 2**40
_UPLOAD_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
#: An upload may take this many times as long as any other request.
_UPLOAD_TIME_FACTOR: Final = 10

NewName = Annotated[str, Path(pattern=NAME_PATTERN)]
Name = Annotated[str, Path(max_length=64)]

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=PROBLEM_RESPONSES)


@router.get("")
def list_datasets(
    *,
    settings: SettingsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = MAX_PAGE_SIZE,
    after: Annotated[str, Query(description="the last name of the page before")] = "",
) -> DatasetList:
    """Built-in data sets first, then the uploaded ones by name."""
    built_in = [_describe_built_in(name) for name in BuiltInDataset] if not after else []
    paths = [path for path in list_npz(settings.datasets_dir) if path.stem > after]
    uploaded = [DatasetPublic.of(path) for path in paths[:limit]]
    return DatasetList(data=[*built_in, *uploaded], has_more=len(paths) > limit)


@router.put(
    "/{name}",
    status_code=201,
    responses={200: {"description": "The same file was uploaded before", "model": DatasetDetails}},
    openapi_extra=_UPLOAD_BODY,
    max_body_size=_MAX_BODY_BYTES,
)
async def add_dataset(
    name: NewName, *, request: Request, response: Response, engine: EngineDep, settings: SettingsDep
) -> DatasetDetails:
    """Upload an `.npz` file as the body. Its arrays `train`, `val` and `test`, or `images`, have
    shape (N, S, S) and colours 0-9. The file is checked first and never replaces another."""
    if name in set(BuiltInDataset):
        raise ConflictError(f"{name} is built in; use another name")
    extend_deadline(request, seconds=_UPLOAD_TIME_FACTOR * settings.request_seconds)
    await asyncio.to_thread(ensure_space, engine, settings)
    with open_upload(settings.datasets_dir) as file:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > settings.max_upload_bytes:
                limit = f"{settings.max_upload_bytes} bytes are allowed (LOSSLAB_MAX_UPLOAD_BYTES)"
                raise TooLargeError(f"the data set is too large; {limit}")
            file.write(chunk)
        is_new = await asyncio.to_thread(
            admit_upload, file, name=name, datasets_dir=settings.datasets_dir
        )
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{name}"
    return await asyncio.to_thread(read_dataset, name, settings=settings)


@router.get("/{name}")
def read_dataset(name: Name, *, settings: SettingsDep) -> DatasetDetails:
    """The number of grids, their size, their colours, and how many of them are the same."""
    if name in set(BuiltInDataset):
        return DatasetDetails(**_describe_built_in(name).model_dump())
    contents = _read_contents(name, settings=settings)
    path = find_npz(name, datasets_dir=settings.datasets_dir)
    counts = contents.colour_counts
    return DatasetDetails(
        **DatasetPublic.of(path).model_dump(),
        num_grids=contents.num_grids,
        grid_size=contents.grid_size,
        colour_counts=counts,
        background_share=counts[0] / sum(counts),
        overlap={key: OverlapPublic(**each._asdict()) for key, each in contents.overlap.items()},
        preview_url=locate(f"/datasets/{name}/preview.png"),
    )


@router.get(
    "/{name}/preview.png",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, 304: NOT_MODIFIED},
)
def read_preview(name: Name, *, request: Request, settings: SettingsDep) -> Response:
    """A picture of the first grids."""
    if name in set(BuiltInDataset):
        raise NotFoundError(f"{name} is generated when a job needs it; it has no picture")
    picture = draw_preview(_read_contents(name, settings=settings))
    headers = {"ETag": f'"{hashlib.sha256(picture).hexdigest()}"', "Cache-Control": "no-cache"}
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(picture, media_type="image/png", headers=headers)


@router.delete("/{name}", status_code=204)
def delete_dataset(name: Name, *, engine: EngineDep, settings: SettingsDep) -> None:
    """Delete an uploaded data set; refused while a job or a race that goes on needs it."""
    if name in set(BuiltInDataset):
        raise ConflictError(f"{name} is built in")
    with write_transaction(engine) as session:
        if user := _find_user(session, name):
            raise ConflictError(f"{user} needs the data set {name!r}; cancel it first")
        try:
            find_npz(name, datasets_dir=settings.datasets_dir).unlink()
        except (DatasetError, FileNotFoundError) as error:
            raise NotFoundError(str(error)) from None


def _describe_built_in(name: str) -> DatasetPublic:
    return DatasetPublic(name=name, is_built_in=True, size_bytes=None, modified_at=None)


def _read_contents(name: str, *, settings: Settings) -> DatasetContents:
    """Raises NotFoundError."""
    try:
        return read_contents(name, datasets_dir=settings.datasets_dir)
    except (DatasetError, FileNotFoundError) as error:
        raise NotFoundError(str(error)) from None


def _find_user(session: Session, name: str) -> str | None:
    """What will read the data set: `job 3f2a9c51d07e` or `study 04b1c2d3e4f5`."""
    jobs = select(Job.id).where(
        col(Job.status).not_in(TERMINAL_STATUSES), col(Job.config)["dataset"].as_string() == name
    )
    if job_id := session.exec(jobs.limit(1)).first():
        return f"job {job_id}"
    for race in studies.read_races(session):
        if any(arm.config["dataset"] == name for arm in race.arm_list):
            return f"study {race.id}"
    return None
