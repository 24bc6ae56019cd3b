"""Provenance: what made a job's numbers."""

from typing import Final

from pydantic import BaseModel, Field, StrictBool, StrictInt

#: What changes the numbers, with its name in a message.
_CAUSES: Final = {
    "losslab_version": "Losslab",
    "source_sha256": "source code",
    "python_version": "Python",
    "torch_version": "torch",
    "numpy_version": "numpy",
    "cuda_version": "CUDA",
    "driver_version": "driver",
    "device": "device",
    "number_format": "number format",
}
_NUM_SHOWN_DIGITS: Final = 12


class Provenance(BaseModel):
    """The program, packages and machine of a job's newest attempt. Another version may have stored
    fewer values."""

    losslab_version: str = ""
    revision: str | None = Field(
        default=None, description="the commit of the source code, where it lies in a git checkout"
    )
    is_changed: StrictBool | None = Field(
        default=None,
        description="whether the source code differs from its commit or its installed package; "
        "null if neither is known",
    )
    source_sha256: str = Field(
        default="", description="of all Python files of `server` and `worker`, with their names"
    )
    python_version: str = ""
    torch_version: str = ""
    numpy_version: str = ""
    cuda_version: str | None = None
    driver_version: str | None = None
    device: str = ""
    num_threads: StrictInt | None = Field(default=None, description="null on a GPU")
    number_format: str = Field(default="", description="in which the model computes")
    step_path: str = Field(default="", description="how steps are launched, a StepPath")
    host: str = ""
    worker_id: str = Field(default="", description="the process that trained: host/pid/random")

    def describe_source(self) -> str:
        """The version and, as far as it is known, the commit and whether it was changed."""
        parts = [f"Losslab {self.losslab_version}"]
        if self.revision:
            parts.append(f"commit {self.revision[:_NUM_SHOWN_DIGITS]}")
        if self.is_changed:
            parts.append(f"changed, source {self.source_sha256[:_NUM_SHOWN_DIGITS]}")
        return ", ".join(parts)

    def describe_change(self, earlier: "Provenance") -> str | None:
        """How this attempt differs from an earlier one, if that may change numbers by rounding."""
        changes = [
            f"{name} {_show(new)} instead of {_show(old)}"
            for field, name in _CAUSES.items()
            if (new := getattr(self, field)) != (old := getattr(earlier, field))
        ]
        return f"this attempt has {', '.join(changes)}" if changes else None


def _show(value: str | None) -> str:
    if not value:
        return "none"
    is_digest = len(value) == 64 and " " not in value
    return value[:_NUM_SHOWN_DIGITS] if is_digest else value
