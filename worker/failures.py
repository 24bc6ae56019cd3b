"""Failures: what an error that ended an attempt means, as a message for the user."""

import errno
from typing import Final, NamedTuple

import torch

from server.errors import LosslabError
from server.files.npz import DatasetError
from server.messages import redact
from server.models.configuration import StoredConfigError
from server.models.tables import FailureKind, Job
from worker.training import NonFiniteLossError

_DEVICE_FAILED: Final = "device_failed"
_DISK_FULL: Final = "disk_full"
_FILE_ERROR: Final = "file_error"


class DeviceBrokenError(LosslabError):
    """The accelerator failed: this process cannot use it any more and must be replaced."""


class Failure(NamedTuple):
    """An error as the job shows it."""

    code: str
    message: str
    kind: FailureKind

    @property
    def is_of_disk(self) -> bool:
        """Whether other jobs may meet it too: a full disk, or one that is read-only."""
        return self.code in (_DISK_FULL, _FILE_ERROR)

    @property
    def is_of_device(self) -> bool:
        """Whether this process can no longer use its device."""
        return self.code == _DEVICE_FAILED


def describe_failure(error: Exception, *, job: Job) -> Failure:
    """Say what went wrong, and of which kind that is. Without secrets: the message is stored."""
    failure = _describe(error, job=job)
    return failure._replace(message=redact(failure.message))


def _describe(error: Exception, *, job: Job) -> Failure:
    match error:
        case DatasetError():
            return Failure("bad_dataset", str(error), FailureKind.user)
        case StoredConfigError():
            return Failure("unknown_config", str(error), FailureKind.user)
        case NonFiniteLossError():
            return Failure("non_finite_loss", str(error), FailureKind.numeric)
        case _ if _is_out_of_memory(error):
            message = (
                f"out of memory with batch_size {job.training_config.batch_size}; "
                "a smaller batch_size or num_samples helps"
            )
            return Failure("out_of_memory", message, FailureKind.oom)
        case _ if _is_device_failure(error):
            message = f"the device failed: {str(error).partition(chr(10))[0]}"
            return Failure(_DEVICE_FAILED, message, FailureKind.infrastructure)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            message = f"no space left for the job's files: {error}; resume the job once there is"
            return Failure(_DISK_FULL, message, FailureKind.infrastructure)
        case OSError():
            message = f"the job's files cannot be read or written: {error}"
            return Failure(_FILE_ERROR, message, FailureKind.infrastructure)
        case _:
            message = f"{type(error).__name__}: {error}; the job's log has the traceback"
            return Failure("internal_error", message, FailureKind.infrastructure)


def _is_out_of_memory(error: Exception) -> bool:
    # Neither the CPU's allocator nor CUDA's libraries have an exception type of their own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _mentions(
        error,
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )


def _is_device_failure(error: Exception) -> bool:
    # The other errors of CUDA's libraries have no exception type either.
    return isinstance(error, torch.AcceleratorError) or _mentions(
        error, "CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS"
    )


def _mentions(error: Exception, *words: str) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
