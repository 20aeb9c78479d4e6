"""A disk that is full, as far as one process is concerned."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """Lets no file grow beyond `size` bytes; a write across the limit fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield limit_files(size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_files(size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
