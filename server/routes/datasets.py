"""Data sets: bring one, look at it, remove it."""

import asyncio
import hashlib
import io
from typing import Annotated, Final

import numpy as np
from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from PIL import Image
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server import retention
from server.database import write_transaction
from server.datasets import (
    BUILT_IN_DATASETS,
    DATASET_NAME_PATTERN,
    PALETTE,
    DatasetContents,
    DatasetError,
    admit_upload,
    find_npz,
    list_npz,
    open_upload,
    read_contents,
)
from server.dependencies import NOT_MODIFIED, EngineDep, SettingsDep, is_known
from server.models import TERMINAL_STATUSES, Job
from server.problems import PROBLEM_RESPONSES
from server.schemas import DatasetDetails, DatasetList, DatasetPublic
from server.settings import Settings

MAX_PAGE_SIZE = 100
# The real limit is a setting, and is looked after while the body comes in.
_MAX_BODY_BYTES: Final = 2**40
_UPLOAD_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_PREVIEW_COLUMNS, _PREVIEW_SCALE, _PREVIEW_GAP = 8, 4, 1
_PAPER: Final = 0xFF

NewName = Annotated[str, Path(pattern=DATASET_NAME_PATTERN)]
Name = Annotated[str, Path(max_length=64)]

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=PROBLEM_RESPONSES)


@router.get("")
def list_datasets(
    *,
    settings: SettingsDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = MAX_PAGE_SIZE,
    after: Annotated[str, Query(description="the last name of the page before")] = "",
) -> DatasetList:
    """What is built in, then the files that were brought, by name."""
    built_in = [_describe_built_in(name) for name in BUILT_IN_DATASETS] if not after else []
    paths = [path for path in list_npz(settings.datasets_dir) if path.stem > after]
    brought = [DatasetPublic.of(path) for path in paths[:limit]]
    return DatasetList(data=[*built_in, *brought], has_more=len(paths) > limit)


@router.put(
    "/{name}",
    status_code=201,
    responses={200: {"description": "The very same file is there", "model": DatasetDetails}},
    openapi_extra=_UPLOAD_BODY,
    max_body_size=_MAX_BODY_BYTES,
)
async def add_dataset(
    name: NewName, *, request: Request, response: Response, engine: EngineDep, settings: SettingsDep
) -> DatasetDetails:
    """Send an `.npz` file as the body: arrays `train`, `val` and `test`, or `images`, of colours
    0-9, (N, S, S). It is checked before it gets its name, and never replaces another."""
    if name in BUILT_IN_DATASETS:
        raise HTTPException(409, f"{name} is built in; use another name")
    await asyncio.to_thread(_check_room, engine, settings)
    with open_upload(settings.datasets_dir) as file:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > settings.max_upload_bytes:
                limit = f"{settings.max_upload_bytes} bytes are allowed (LOSSLAB_MAX_UPLOAD_BYTES)"
                raise HTTPException(413, f"the data set is too large; {limit}")
            file.write(chunk)
        is_new = await asyncio.to_thread(
            admit_upload, file, name=name, datasets_dir=settings.datasets_dir
        )
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{name}"
    return await asyncio.to_thread(read_dataset, name, settings=settings)


@router.get("/{name}")
def read_dataset(name: Name, *, settings: SettingsDep) -> DatasetDetails:
    """How many grids, of which size, in which colours."""
    if name in BUILT_IN_DATASETS:
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
        preview_url=f"/datasets/{name}/preview.png",
    )


@router.get(
    "/{name}/preview.png",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, 304: NOT_MODIFIED},
)
def read_preview(name: Name, *, request: Request, settings: SettingsDep) -> Response:
    """A picture of its first grids."""
    if name in BUILT_IN_DATASETS:
        raise HTTPException(404, f"{name} is generated when a job needs it; there is no picture")
    picture = _draw_preview(_read_contents(name, settings=settings))
    headers = {"ETag": f'"{hashlib.sha256(picture).hexdigest()}"', "Cache-Control": "no-cache"}
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(picture, media_type="image/png", headers=headers)


@router.delete("/{name}", status_code=204)
def delete_dataset(name: Name, *, engine: EngineDep, settings: SettingsDep) -> None:
    """Refused while a job that has not ended needs it."""
    if name in BUILT_IN_DATASETS:
        raise HTTPException(409, f"{name} is built in")
    with write_transaction(engine) as session:
        if job_id := _find_user(session, name):
            detail = f"job {job_id} needs the data set {name!r}; cancel it first"
            raise HTTPException(409, detail)
        try:
            find_npz(name, datasets_dir=settings.datasets_dir).unlink()
        except (DatasetError, FileNotFoundError) as error:
            raise HTTPException(404, str(error)) from None


def _check_room(engine: Engine, settings: Settings) -> None:
    """Raises HTTPException 507."""
    limit = settings.max_storage_bytes
    if not limit or retention.measure_storage(engine, settings) < limit:
        return
    retention.free_space(engine, settings)
    if retention.measure_storage(engine, settings) >= limit:
        detail = f"the {limit} bytes that may be stored (LOSSLAB_MAX_STORAGE_BYTES) are in use"
        raise HTTPException(507, f"{detail}; delete jobs or data sets first")


def _describe_built_in(name: str) -> DatasetPublic:
    return DatasetPublic(name=name, is_built_in=True, size_bytes=None, modified_at=None)


def _read_contents(name: str, *, settings: Settings) -> DatasetContents:
    """Raises HTTPException 404."""
    try:
        return read_contents(name, datasets_dir=settings.datasets_dir)
    except (DatasetError, FileNotFoundError) as error:
        raise HTTPException(404, str(error)) from None


def _find_user(session: Session, name: str) -> str | None:
    jobs = select(Job.id).where(
        col(Job.status).not_in(TERMINAL_STATUSES), col(Job.config)["dataset"].as_string() == name
    )
    return session.exec(jobs.limit(1)).first()


def _draw_preview(contents: DatasetContents) -> bytes:
    """PNG of up to 40 grids, eight a row."""
    cell = contents.grid_size * _PREVIEW_SCALE + _PREVIEW_GAP
    num_rows = -(-len(contents.sample) // _PREVIEW_COLUMNS)
    shape = (num_rows * cell + _PREVIEW_GAP, _PREVIEW_COLUMNS * cell + _PREVIEW_GAP, 3)
    image = np.full(shape, _PAPER, dtype=np.uint8)
    for index, grid in enumerate(contents.sample):
        top, left = (i * cell + _PREVIEW_GAP for i in divmod(index, _PREVIEW_COLUMNS))
        drawn = PALETTE[grid].repeat(_PREVIEW_SCALE, axis=0).repeat(_PREVIEW_SCALE, axis=1)
        image[top : top + len(drawn), left : left + len(drawn)] = drawn
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
