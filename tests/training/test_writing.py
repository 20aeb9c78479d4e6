"""Files that cannot be written."""

import pytest

from memopt.training.writing import WriteError, closing, write_whole
from tests.training.disks import files_of_at_most


class Full:
    closed = False

    def close(self):
        self.closed = True
        raise WriteError("the disk is full")


@pytest.mark.parametrize("first", [KeyboardInterrupt, WriteError, ValueError])
def test_a_failure_to_close_does_not_hide_the_first_error(first):
    full = Full()
    with pytest.raises(first, match="first"), closing(full):
        raise first("first")
    assert full.closed


def test_a_failure_to_close_is_raised_when_there_is_no_other():
    with pytest.raises(WriteError, match="full"), closing(Full()):
        pass


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    path = tmp_path / "loss.png"
    write_whole(path, b"old")
    with files_of_at_most(1000), pytest.raises(OSError, match="too large"):
        write_whole(path, bytes(2000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
