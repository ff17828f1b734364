"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from receptance.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` only when all of it is on disk.

    Whatever goes wrong (a full disk, a signal), the previous file stays as it was and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name[:100]}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    # torch reports a failed write of its own as RuntimeError
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the temporary file's name
        raise CheckpointError(f"{path}: could not be written ({reason}); what was there before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make what a file holds, or a rename in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
