"""Who may write to a run's directory, and how that ends."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from memopt.training import lock as module
from memopt.training.lock import LOCK, Lock
from memopt.training.writing import WriteError

#: Does what `Lock` does, without its imports, which take a second.
HOLDER = """
import fcntl, json, os, socket, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
mine = {"host": socket.gethostname(), "process": os.getpid(), "kernel": sys.argv[2], "token": ""}
json.dump(mine, file)
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_TOUCHES", 0.05)
    monkeypatch.setattr(module, "SECONDS_TO_WAIT", 0.3)


def write_owner(directory, **other):
    other = {"host": "elsewhere", "process": 7, "kernel": "another", "token": "another"} | other
    (directory / LOCK).write_text(json.dumps(other))


def owner(directory):
    return json.loads((directory / LOCK).read_text() or "null")


def us():
    return module._this_process()


def test_a_process_that_lives_is_named_and_one_that_was_killed_is_followed_at_once(tmp_path):
    hold = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK), us()["kernel"]]
    holder = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"process {holder.pid} on {socket.gethostname()}: "):
            Lock(tmp_path).acquire()
        holder.kill()
    assert owner(tmp_path)["process"] == holder.pid
    lock = Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path) == us()


def test_the_file_is_empty_after_an_end_in_order(tmp_path):
    closed, forgotten = Lock(tmp_path), Lock(tmp_path)
    closed.acquire()
    closed.close()
    assert owner(tmp_path) is None
    forgotten.acquire()
    assert owner(tmp_path) == us()
    del forgotten
    assert owner(tmp_path) is None


def test_objects_of_one_process_share_the_lock(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    second.acquire()
    second.close()
    assert owner(tmp_path) == us()
    first.check()


@pytest.mark.parametrize("flock_works", [True, False])
@pytest.mark.filterwarnings("ignore:the run in .* may be in use:UserWarning")
def test_an_owner_on_another_host_lives_as_long_as_it_touches_the_file(
    tmp_path, monkeypatch, flock_works
):
    if not flock_works:
        failing = OSError(errno.ENOSYS, "Function not implemented")
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(failing))
    write_owner(tmp_path)
    ended = threading.Event()
    touching = threading.Thread(target=touch_until, args=(tmp_path / LOCK, ended))
    touching.start()
    with pytest.raises(ValueError, match="in use by process 7 on elsewhere"):
        Lock(tmp_path).acquire()
    ended.set()
    touching.join()
    lock = Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path) == us()


@pytest.mark.filterwarnings("ignore:the run in .* may be in use:UserWarning")
@pytest.mark.parametrize("locked", [True, False])
def test_a_dead_owner_of_the_same_name_on_another_host_is_followed(tmp_path, monkeypatch, locked):
    """Containers may share host name and process number; a file server may keep a dead lock."""
    monkeypatch.setattr(module, "_flock", lambda _: locked)
    write_owner(tmp_path, host=us()["host"], process=us()["process"])
    lock = Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path) == us()
    lock.check()
    write_owner(tmp_path, host=us()["host"], process=us()["process"])
    with pytest.raises(WriteError, match="has taken over the run"):
        lock.check()


def touch_until(path, ended):
    while not ended.wait(0.02):
        os.utime(path)


@pytest.mark.filterwarnings("ignore:the run in .* may be in use:UserWarning")
def test_a_waiting_start_takes_over_at_once_when_the_owner_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_WAIT", 1e9)
    write_owner(tmp_path)
    threading.Timer(0.05, (tmp_path / LOCK).write_text, [""]).start()
    lock = Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path) == us()


def test_the_owner_touches_the_file_until_another_has_taken_it_over(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    first = (tmp_path / LOCK).stat().st_mtime_ns
    while (tmp_path / LOCK).stat().st_mtime_ns == first:
        time.sleep(0.01)
    lock.check()
    write_owner(tmp_path)
    with pytest.raises(WriteError, match="process 7 on elsewhere has taken over the run"):
        lock.check()
    lock.close()
    assert owner(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": "el'])
def test_a_file_that_names_nobody_is_free(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    lock = Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path) == us()
