"""The command `losslab` of a user who may not write to what is closed, also where root tests it."""

import ctypes
import os

#: From Linux's <linux/capability.h>.
_VERSION_3 = 0x20080522
#: From <sys/prctl.h> and <linux/securebits.h>: no program gets root's capabilities back.
_PR_SET_SECUREBITS, _SECBIT_NOROOT = 28, 1


def main() -> None:
    """Run the command, in the folder of TESTS_FOLDER if that is set."""
    give_up_rights()
    if folder := os.environ.pop("TESTS_FOLDER", None):
        os.chdir(folder)
    from server.cli.main import app  # noqa: PLC0415

    app()


def give_up_rights() -> None:
    """Root without its capabilities may write only what modes allow, as everybody else."""
    library = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        assert library.prctl(_PR_SET_SECUREBITS, _SECBIT_NOROOT, 0, 0, 0) == 0, ctypes.get_errno()
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    no_rights = (ctypes.c_uint32 * 6)()
    assert library.capset(header, no_rights) == 0, ctypes.get_errno()
