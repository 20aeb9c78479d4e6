"""When a process joins others, and what it is told when it cannot."""

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from memopt.internals import clusters
from memopt.training import processes
from memopt.training.config import Run
from memopt.training.placement import make_mesh
from memopt.training.processes import (
    STEPS_TO_STOP,
    StopAgreement,
    broadcast,
    check_same_on_all_processes,
    init_distributed,
)

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "host-0,host-1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
}
THREE = {"coordinator": "node1:1234", "processes": 4, "process": 2}


@pytest.fixture
def joined(monkeypatch):
    """How `jax.distributed.initialize` was called: the three and the heartbeat."""
    calls = []

    def initialize(*three, heartbeat_timeout_seconds, shutdown_timeout_seconds, **method):
        assert shutdown_timeout_seconds == heartbeat_timeout_seconds
        in_cluster = any(cluster.is_env_present() for cluster in clusters())
        assert method == {"cluster_detection_method": None if in_cluster else "deactivate"}
        calls.append((*three, heartbeat_timeout_seconds))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def surround(monkeypatch, environment):
    for name in (*SLURM, *TPU):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    in_pod = "TPU_WORKER_ID" in environment
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", in_pod)


@pytest.mark.parametrize(
    ("environment", "options", "calls"),
    [
        ({}, {}, []),
        ({}, THREE, [("node1:1234", 4, 2, 60)]),
        ({}, THREE | {"heartbeat_timeout": 5}, [("node1:1234", 4, 2, 5)]),
        ({}, {"coordinator": "node1:1234", "processes": 1, "process": 0}, []),
        (SLURM, {}, [(None, None, None, 60)]),
        (SLURM, THREE, [("node1:1234", 4, 2, 60)]),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, []),
        ({"SLURM_JOB_ID": "7"}, {}, []),  # in salloc's shell
        (TPU, {}, [(None, None, None, 60)]),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, []),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, []),
    ],
)
def test_jax_is_joined_where_there_are_others(monkeypatch, joined, environment, options, calls):
    surround(monkeypatch, environment)
    init_distributed(Run(**options))
    assert joined == calls


@pytest.mark.parametrize(
    ("environment", "options", "says"),
    [
        ({}, {"processes": 2}, "go together, got None, 2 and None"),
        ({}, THREE | {"process": None}, "go together, got node1:1234, 4 and None"),
        ({}, THREE | {"process": 4}, "process=4 must be from 0 to processes - 1, 3"),
        ({}, THREE | {"processes": 0}, "processes must be at least 1, got 0"),
        ({}, THREE | {"coordinator": "node1"}, "coordinator 'node1' must be HOST:PORT"),
        ({}, {"heartbeat_timeout": 0}, "heartbeat_timeout must be at least 1, got 0"),
        (SLURM, THREE | {"process": 1}, r"process=1 contradict the cluster \(slurm\), where this"),
        (SLURM, THREE | {"processes": 8}, "processes=8 and .* this is process 2 of 4: leave them"),
        (TPU, THREE, r"contradict the cluster \(gketpu\), where this is process 1 of 2"),
    ],
)
def test_what_contradicts_is_told(monkeypatch, joined, environment, options, says):
    surround(monkeypatch, environment)
    with pytest.raises(ValueError, match=says):
        init_distributed(Run(**options))
    assert not joined


@pytest.mark.parametrize(
    ("spec", "rows", "says"),
    [
        ("data=4", 8, "mesh 'data=4', for 8 rows .* must take in all 8 devices of the 2 processes"),
        (None, 12, "mesh 'data=4', for 12 rows .* must take in all 8 devices"),
    ],
)
def test_all_devices_of_several_processes_are_needed(monkeypatch, spec, rows, says):
    make_mesh(spec, rows)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=says):
        make_mesh(spec, rows)


def test_processes_started_differently_are_told(monkeypatch):
    theirs = np.array([0, 1, 0], np.uint32)
    gather = lambda mine: np.stack([mine, mine + theirs])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    with pytest.raises(ValueError, match=r"^seed must be the same in all 2 processes"):
        check_same_on_all_processes({"model": "nano", "seed": 0, "steps": 3})


def test_all_processes_are_told_what_the_first_says(monkeypatch):
    """Their arrays have the same shape at each of its two calls."""
    sent = []

    def send(array):
        sent.append(np.asarray(array))
        return sent[-1].astype(np.uint32) if sent[-1].ndim else sent[-1]  # as a sum is

    def receive(array):
        assert (np.shape(array), np.asarray(array).dtype) == (sent[0].shape, sent[0].dtype)
        return sent.pop(0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for value in (None, {"name": "ē", "losses": [0.1, float("inf")]}, "x" * 1000):
        for transfer in (send, receive):
            monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", transfer)
            assert broadcast(value if transfer is send else {"own": 1}) == value
    assert not sent


@pytest.mark.parametrize(
    ("seconds", "asks"),
    [(0.001, [1, 17, 33, 49]), (0.3, [1, 4, 7, 10]), (2.0, [1, 2, 3, 4])],
)
def test_processes_gather_signals_once_a_second_and_stop_together(monkeypatch, seconds, asks):
    """The other process takes half as long; both go by the longer of the times."""
    clock, asked = [0.0], []

    def gather(mine):
        asked.append(step)
        return np.stack([mine, mine / 2 + np.float32([15 * (step >= asks[3]), 0])])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(processes.time, "perf_counter", lambda: clock[0])
    agree, step, found = StopAgreement(), 0, 0
    while not found:
        step += 1
        clock[0] += seconds
        found = agree(0)
    assert (asked, found) == (asks, 15)
    assert max(np.diff(asks)) <= STEPS_TO_STOP


def test_one_process_asks_nobody_and_hears_of_a_signal_at_once(monkeypatch):
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", None)
    agree = StopAgreement()
    assert [agree(0), agree(0), agree(15)] == [0, 0, 15]
