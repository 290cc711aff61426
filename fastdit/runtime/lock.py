"""One run in a folder at a time: a lock that the kernel releases when its process ends, however it ends."""

import errno
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from fastdit.config import UserError, plain

NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer
LIMIT = 200  # bytes read of what a holder wrote


class Lock:
    """A lock on a file, of one process of a run. The file stays; it says who holds the lock, or held it last.

    A POSIX lock: it works across machines on NFS, and a child that outlives the process does not keep it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: int | None = None

    def take(self) -> str:
        """Take the lock, if it is not taken yet. Returns "", or a warning where the file system has no locks.

        Raises UserError, which names the holder, where another process has it; OSError where the file cannot be made.
        """
        if self.file is not None:
            return ""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = plain(os.read(file, LIMIT).decode(errors="replace").strip()) or "another process"
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.path.parent} is in use by {holder}; wait for it, stop it, or choose --run.fresh"
                ) from None
            if error.errno in NONE:
                return f"{self.path.parent}: this file system has no locks; do not start a second run in this folder"
            raise
        self.file = file
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        return ""

    def release(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
