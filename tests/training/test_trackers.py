"""Weights & Biases and MLflow get what metrics.jsonl gets, and never end a run."""

import struct
import sys
import threading
import warnings
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.training import trackers
from memopt.training.config import Config, Run
from memopt.training.loop import train
from memopt.training.metrics import MetricsLog
from memopt.training.open import open_run
from memopt.training.trackers import Background

METRICS = {"loss": 1.5, "gradient_norm": 2.0}
WANDB, MLFLOW = (Config(run=Run(log=(name,))) for name in ("wandb", "mlflow"))


class Recorder:
    """A service that keeps what it is sent."""

    def __init__(self, rows, directory, options):
        self.sent, self.options = rows, options

    def write(self, rows):
        self.sent += [(step, dict(metrics)) for step, metrics in rows]

    def close(self, done):
        self.sent.append(done)


@pytest.fixture
def record(monkeypatch):
    """Replaces Weights & Biases by a service that keeps what it is sent."""
    rows, made = [], []
    make = lambda *arguments: made.append(Recorder(rows, *arguments)) or made[-1]
    monkeypatch.setitem(trackers.SERVICES, "wandb", make)
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    monkeypatch.setattr("memopt.training.open.check_trackers", lambda names: None)
    return rows, made


def start(text, output, *options):
    flags = (
        f"--model=nano --data {text} --batch-size=8 --seq-len=32 --eval-tokens=512 --mesh=data=1 "
        f"--checkpoint-every=2 --steps=3 --output={output}"
    )
    return open_run(parse([*flags.split(), *options]))


@pytest.mark.slow
def test_a_service_gets_all_that_metrics_jsonl_gets_also_from_a_resumed_run(record, text, tmp_path):
    rows, made = record
    first = start(text, tmp_path / "run", "--log", "wandb", "tensorboard")
    train(first, Console(quiet=True))
    train(
        open_run(parse(["--resume", f"--output={tmp_path / 'run'}", "--steps=5"])),
        Console(quiet=True),
    )
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    sent = [{"step": row[0], **row[1]} for row in rows if row is not True]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert sent == lines
    assert [row for row in rows if isinstance(row, bool)] == [True, True]
    assert made[0].options == first.config.flat()
    assert made[1].options["steps"] == 5
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def failing(where, error):
    def fail(*_):
        raise error

    service = SimpleNamespace(write=lambda rows: None, close=lambda done: None)
    if where == "make":
        return fail
    setattr(service, where, fail)
    return lambda *_: service


@pytest.mark.parametrize("where", ["make", "write", "close"])
def test_a_service_that_fails_is_warned_about_once_and_the_log_is_whole(
    monkeypatch, tmp_path, where
):
    error = ConnectionError("no route to host\n  at line 3")
    monkeypatch.setitem(trackers.SERVICES, "wandb", failing(where, error))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        log = MetricsLog(tmp_path, 0, WANDB)
        for step in range(1, 50):
            log.write(step, METRICS)
        log.close()
    assert [str(warning.message) for warning in warned] == [
        "wandb does not take the metrics (no route to host): the run goes on without it."
    ]
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 49


@pytest.mark.parametrize("never", ["opens", "writes", "closes"])
def test_a_service_that_does_not_answer_holds_no_step_and_the_rest_only_briefly(monkeypatch, never):
    monkeypatch.setattr(trackers, "SECONDS_TO_OPEN", 0.05)
    monkeypatch.setattr(trackers, "SECONDS_TO_CLOSE", 0.05)
    answer = threading.Event()
    wait = lambda now: answer.wait() if never == now else None
    service = SimpleNamespace(write=lambda _: wait("writes"), close=lambda _: wait("closes"))
    background = Background("mlflow", lambda: wait("opens") or service)
    for step in range(1, 50):
        background.write(step, METRICS)
    with pytest.warns(UserWarning, match=r"mlflow does not take the metrics \(no answer within"):
        background.close()
    answer.set()


def test_what_waits_is_sent_together():
    sent, go = [], threading.Event()
    service = SimpleNamespace(
        write=lambda rows: go.wait() and sent.append([step for step, _ in rows]),
        close=lambda done: sent.append(done),
    )
    background = Background("mlflow", lambda: service)
    for step in range(1, 6):
        background.write(step, METRICS)
    go.set()
    background.close(done=False)
    *parts, done = sent
    assert [step for part in parts for step in part] == [1, 2, 3, 4, 5]
    assert len(parts) <= 2
    assert done is False


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` whose runs know the steps that were logged before."""
    made = []

    def init(**options):
        steps, kept, ends = [], {}, []
        before = [step for run in made if run.options["id"] == options["id"] for step in run.steps]
        run = SimpleNamespace(
            options=options,
            step=max(before, default=-1) + 1,  # the next one
            steps=steps,
            kept=kept,
            config=SimpleNamespace(update=lambda given, allow_val_change: kept.update(given)),
            log=lambda metrics, step: steps.append(step),
            finish=lambda exit_code: ends.append(exit_code),
            ends=ends,
        )
        made.append(run)
        return run

    module = ModuleType("wandb")
    module.init, module.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


def test_a_resumed_run_continues_its_run_of_weights_and_biases(fake_wandb, tmp_path):
    for begin, end in ((0, 4), (2, 6)):
        log = MetricsLog(tmp_path, begin, WANDB)
        for step in range(begin + 1, end + 1):
            log.write(step, METRICS | {"loss": float(step)})
        log.close()
    first, second = fake_wandb
    assert first.options["id"] == second.options["id"] == (tmp_path / "wandb.id").read_text()[:-1]
    assert (first.options["dir"], first.options["name"]) == (tmp_path, tmp_path.name)
    assert first.kept == WANDB.flat()
    assert (first.steps, second.steps) == ([1, 2, 3, 4], [5, 6])
    assert (first.ends, second.ends) == ([1], [1])  # of 600 steps


@pytest.fixture
def fake_mlflow(monkeypatch):
    """A module `mlflow` with a store in memory."""
    runs = {}

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return f"experiment {name}"

        def create_run(self, experiment, run_name):
            key = f"run {len(runs)}"
            runs[key] = SimpleNamespace(where=(experiment, run_name), metrics=[], params={})
            return SimpleNamespace(info=SimpleNamespace(run_id=key))

        def log_batch(self, key, metrics=(), params=()):
            assert len(metrics) <= 1000
            runs[key].metrics += metrics
            runs[key].params |= {param.key: param.value for param in params}

        def get_metric_history(self, key, name):
            return [metric for metric in runs[key].metrics if metric.key == name]

        def update_run(self, key, status):
            runs[key].status = status

        def set_terminated(self, key, status):
            runs[key].status = status

    entity = lambda *names: lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True)))
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = MlflowClient
    entities.Metric = entity("key", "value", "timestamp", "step")
    entities.Param = entity("key", "value")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return runs


def test_a_resumed_run_continues_its_run_of_mlflow(fake_mlflow, tmp_path):
    for begin, end in ((0, 400), (200, 600)):
        log = MetricsLog(tmp_path, begin, MLFLOW)
        for step in range(begin + 1, end + 1):
            log.write(step, METRICS)
        log.close()
        [run] = fake_mlflow.values()
        assert run.status == ("KILLED" if end == 400 else "FINISHED")
    assert run.where == ("experiment memopt", tmp_path.name)
    assert run.params["optimizer"] == "apollo_mini"
    assert [m.step for m in run.metrics if m.key == "loss"] == list(range(1, 601))


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    monkeypatch, text, tmp_path, spec
):
    """Also beside a directory `wandb`, which Python would import."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="log wandb needs the package 'wandb': pip install wandb"):
        start(text, tmp_path / "run", "--log", "wandb")
    assert not (tmp_path / "run").exists()


def wandb_records(path):
    """The records of a file of Weights & Biases, which is a log as LevelDB writes it."""
    records = pytest.importorskip("wandb").proto.wandb_internal_pb2
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # a header is never split over two blocks
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield records.Record.FromString(whole)
            whole = b""


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")  # their own
def test_the_real_ones_take_a_run_and_its_resumption(monkeypatch, text, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    train(start(text, tmp_path / "run", "--log", "wandb", "mlflow"), Console(quiet=True))
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'run'}", "--steps=5"]))
    train(resumed, Console(quiet=True))
    losses = [line["loss"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 5

    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("memopt").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == list(enumerate(losses, 1))
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer"] == "apollo_mini"

    identifier = (tmp_path / "run" / "wandb.id").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    records = [record for path in files for record in wandb_records(path)]
    rows = [
        {item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(int(row["_step"]), float(row["loss"])) for row in rows] == list(enumerate(losses, 1))
    updates = [u for r in records for u in (*r.run.config.update, *r.config.update)]
    assert "optimizer" in {update.key for update in updates}
