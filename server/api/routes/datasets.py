"""Routes for data sets: upload, list, inspect, delete."""

import hashlib
import os
from typing import IO, Annotated, Final

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.api.addresses import locate
from server.api.caching import NOT_MODIFIED, is_known
from server.api.dependencies import EngineDep, SettingsDep
from server.api.limits import extend_deadline
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import MAX_PAGE_SIZE
from server.api.rates import find_client
from server.api.schemas import (
    DatasetDetails,
    DatasetList,
    DatasetPublic,
    LeftOutFile,
    OverlapPublic,
)
from server.api.uploads import UploadsDep
from server.database.engine import take_turn, write_transaction
from server.errors import ConflictError, NotFoundError
from server.files.datasets import (
    DatasetContents,
    check_free,
    draw_preview,
    find_npz,
    list_left_out,
    list_npz,
    open_upload,
)
from server.files.imports import Fit, check_fit
from server.files.inspection import (
    CheckedUpload,
    CheckLimitError,
    admit_upload,
    read_contents,
)
from server.files.npz import DatasetError
from server.jobs import studies
from server.jobs.retention import ensure_space, reserve_space
from server.models.configuration import BuiltInDataset, read_config
from server.models.names import EntityName
from server.models.tables import TERMINAL_STATUSES, Job
from server.settings import Settings

_UPLOAD_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in ("application/octet-stream", "application/json", "application/zip")
        },
    }
}
#: An upload may take this many times as long as any other request.
_UPLOAD_TIME_FACTOR: Final = 10

NewName = Annotated[EntityName, Path()]
Pad = Annotated[
    int | None,
    Query(description="fill up grids with background to this size, at the right and below"),
]
Crop = Annotated[
    int | None, Query(description="cut larger grids to this size, and keep their top left part")
]
Name = Annotated[str, Path(max_length=64)]

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=PROBLEM_RESPONSES)


@router.get("")
def list_datasets(
    *,
    settings: SettingsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = MAX_PAGE_SIZE,
    after: Annotated[str, Query(description="the last name of the page before")] = "",
) -> DatasetList:
    """Built-in data sets first, then the uploaded ones by name. Files in the folder that are no
    data set are named with the reason."""
    built_in = [_describe_built_in(name) for name in BuiltInDataset] if not after else []
    paths = [path for path in list_npz(settings.datasets_dir) if path.stem > after]
    uploaded = [DatasetPublic.of(path) for path in paths[:limit]]
    left_out = [
        LeftOutFile(**file._asdict()) for file in list_left_out(settings.datasets_dir)[:limit]
    ]
    data = [*built_in, *uploaded]
    return DatasetList(data=data, has_more=len(paths) > limit, left_out=left_out)


@router.put(
    "/{name}",
    status_code=201,
    responses={200: {"description": "The same grids are there already", "model": DatasetDetails}},
    openapi_extra=_UPLOAD_BODY,
)
async def add_dataset(
    name: NewName,
    *,
    request: Request,
    response: Response,
    engine: EngineDep,
    settings: SettingsDep,
    uploads: UploadsDep,
    pad: Pad = None,
    crop: Crop = None,
) -> DatasetDetails:
    """Upload a file as the body: an `.npz` with arrays `train`, `val` and `test`, or `images`, of
    shape (N, S, S) and colours 0-9; an `.npy` with such an array; ARC tasks as JSON, or as a zip of
    JSON. What it is follows from its content. It is checked first and never replaces another."""
    check_free(name)
    _refuse_form(request, name=name)
    fit = Fit(pad=pad, crop=crop)
    check_fit(fit)
    extend_deadline(request, seconds=_UPLOAD_TIME_FACTOR * settings.request_seconds)
    with uploads.enter(find_client(request), settings=settings) as upload:
        upload.num_stored_bytes = await run_in_threadpool(ensure_space, engine, settings)
        with open_upload(settings.datasets_dir) as file:
            upload.check_size(int(request.headers.get("content-length") or 0))
            await upload.receive(request.stream(), file=file)
            checked = await uploads.check(file, request=request, fit=fit, shown_name=f"{name}.npz")
            is_new = await run_in_threadpool(
                _admit, file, checked, name=name, engine=engine, settings=settings
            )
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{name}"
    details = await run_in_threadpool(read_dataset, name, settings=settings)
    return details.model_copy(update={"note": checked.note})


def _admit(
    file: IO[bytes], checked: CheckedUpload, *, name: str, engine: Engine, settings: Settings
) -> bool:
    """Whether the upload was new. Raises DatasetExistsError and StorageFullError."""
    num_bytes = os.fstat(file.fileno()).st_size
    return admit_upload(
        file,
        checked,
        name=name,
        datasets_dir=settings.datasets_dir,
        turn=reserve_space(engine, settings, num_bytes=num_bytes),
    )


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
    """A picture of up to 40 grids, from all over the file."""
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
        take_turn(session)  # so that no job is queued meanwhile that needs it
        try:
            path = find_npz(name, datasets_dir=settings.datasets_dir)
            if user := _find_user(session, name):
                raise ConflictError(f"{user} needs the data set {name!r}; cancel it first")
            path.unlink()
        except (DatasetError, FileNotFoundError) as error:
            raise NotFoundError(str(error)) from None


def _refuse_form(request: Request, *, name: str) -> None:
    """Raises DatasetError for a form, whose wrapper would be stored with the file."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise DatasetError(
            "the body is a form (multipart), of which the file is a part; send the bare file: "
            f"curl -T FILE {request.base_url}datasets/{name}"
        )


def _describe_built_in(name: str) -> DatasetPublic:
    return DatasetPublic(name=name, is_built_in=True, size_bytes=None, modified_at=None)


def _read_contents(name: str, *, settings: Settings) -> DatasetContents:
    """Raises NotFoundError, and CheckLimitError and UnavailableError if it cannot be read."""
    try:
        return read_contents(name, datasets_dir=settings.datasets_dir)
    except CheckLimitError:
        raise
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
        if any(read_config(arm["config"]).dataset == name for arm in race.arms):
            return f"study {race.id}"
    return None
