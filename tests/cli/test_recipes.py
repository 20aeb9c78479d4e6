"""The launch recipes are what they say: commands that parse, scripts that run."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml

from memopt.cli import pretrain
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import parse
from memopt.cli.tokenizer import Options
from memopt.models.llama import from_hugging_face, preset
from memopt.text.tokenizer import load_tokenizer
from memopt.training.batches import check_vocabulary
from memopt.training.placement import parse_mesh
from tests.cli.runs import PROGRAM, ROOT, free_port, metrics, wait_for_step
from tests.training import nano

RECIPES = ROOT / "docs" / "recipes"
#: What each recipe's devices are, as its own text has them.
DEVICES = {
    "slurm.sbatch": lambda text: math.prod(
        int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node")
    ),
    "gke-tpu.yaml": lambda text: math.prod(
        int(re.search(rf"{name}: (\d+)", text)[1]) for name in ("parallelism", "google.com/tpu")
    ),
    "ssh.sh": lambda text: 16,
}
#: Files with commands.
DOCS = {
    path: path.read_text
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RECIPES.iterdir())
} | {Path(pretrain.__file__): lambda: pretrain.__doc__}


def commands(text, command="memopt pretrain"):
    """The arguments of every such command in a text, its variables left out."""
    text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    found = re.findall(rf"^[^`\n]*{command}((?: (?:.*\\\n)*.*)?)$", text, flags=re.MULTILINE)
    words = [shlex.split(re.split(r"\|\||&", line.replace("\\\n", " "))[0]) for line in found]
    return [[word for word in line if not word.startswith("${")] for line in words]


@pytest.mark.parametrize("name", DEVICES)
def test_commands_parse_and_fill_the_devices(name):
    text = (RECIPES / name).read_text()
    (command,) = commands(text)
    config = parse(command)
    mesh = parse_mesh(config.run.mesh)
    assert math.prod(mesh.values()) == DEVICES[name](text)
    assert config.text.batch_size % (mesh.get("data", 1) * mesh.get("fsdp", 1)) == 0
    assert config.text.seq_len <= preset(config.architecture.model).max_seq_len
    assert config.run.output


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_each_command_of_the_documentation_trains_a_model_that_fits_its_tokenizer(path):
    """Bytes fit the tiny one; runs that go on from another have its tokenizer."""
    for command in commands(DOCS[path]().replace("$i", "0")):
        if {"--resume", "--init", "--help"}.isdisjoint(command):
            config = parse(command)
            if config.text.tokenizer == "bytes":
                size = preset(config.architecture.model).vocab_size
                check_vocabulary(load_tokenizer("bytes"), config, size)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_each_command_of_the_documentation_that_fine_tunes_can_be_read(path):
    for command in commands(DOCS[path](), "memopt finetune"):
        if {"--resume", "--help"}.isdisjoint(command):
            # The model that it names is not there; all else is checked.
            command[command.index("--init") : command.index("--init") + 2] = ["--model", "tiny"]
            assert parse_finetune(command).text.data


@pytest.mark.slow
def test_the_page_brings_a_model_fine_tunes_it_and_takes_it_home(tmp_path):
    text = (ROOT / "docs" / "fine_tuning.md").read_text()
    [block] = [part for part in text.split("```") if "examples.capitals" in part]
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ROOT}
    done = subprocess.run(
        ["bash", "-ec", block.removeprefix("sh\n")],
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in paths.items()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-2] == "Paris"
    model = from_hugging_face(tmp_path / "capitals" / "tuned")
    assert model.config.vocab_size == 1024
    assert load_tokenizer(str(tmp_path / "capitals" / "tuned")).encode("Paris").size


def test_the_page_learns_the_tokenizer_of_its_first_large_model():
    text = (ROOT / "docs" / "training.md").read_text()
    [learn] = commands(text, "memopt tokenizer train")
    options = tyro.cli(Options, args=learn)
    assert options.vocab_size == preset("60m").vocab_size
    assert text.index("memopt tokenizer train") < text.index(f"--model 60m --tokenizer {learn[-1]}")


def test_every_recipe_is_looked_at():
    assert {path.name for path in RECIPES.iterdir()} == DEVICES.keys()


def test_scripts_are_bash():
    (job,) = yaml.safe_load((RECIPES / "gke-tpu.yaml").read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    scripts = [(RECIPES / name).read_text() for name in ("slurm.sbatch", "ssh.sh")]
    for script in (*scripts, *container["args"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_gives_each_gpu_a_task():
    text = (RECIPES / "slurm.sbatch").read_text()
    tasks, gpus = (
        re.search(rf"#SBATCH --{name}=(\d+)", text)[1]
        for name in ("ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Starts ssh.sh on two "machines", which are this one."""
    fake = tmp_path / "ssh"
    fake.write_text('#!/usr/bin/env bash\n[[ "$1 $2" = "-o BatchMode=yes" ]]; exec bash -c "$4"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def start(*command, **environment):
        script = ["bash", RECIPES / "ssh.sh", "localhost", "localhost", "--", *command]
        return subprocess.Popen(
            script, cwd=tmp_path, env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )

    return start


WORKER = """
trap 'echo told; exit 143' TERM
echo "$(printf '<%s>' "$@")"  # in one go, as others write there too
for i in {1..1000}; do
    sleep 0.05
    if [[ -f "end${@: -1}" ]]; then exit "$(< "end${@: -1}")"; fi
done
"""


@pytest.mark.parametrize(
    ("ends", "exit_code", "told"), [({0: 0, 1: 0}, 0, 0), ({1: 7}, 7, 1), ({0: 7}, 7, 1)]
)
def test_over_ssh_all_end_when_one_fails(ssh, tmp_path, ends, exit_code, told):
    process = ssh("bash", "-c", WORKER, "worker", "--data", "a b", "it's")
    out = "".join(process.stdout.readline() for _ in range(2))  # both are there
    for index, code in ends.items():
        (tmp_path / f"end{index}").write_text(str(code))
    out += process.communicate(timeout=60)[0]
    assert process.returncode == exit_code
    three = "<--coordinator><localhost:12321><--processes><2><--process>"
    for index in (0, 1):
        assert f"<--data><a b><it's>{three}<{index}>" in out
    assert out.count("told") == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_over_ssh_all_end_when_the_script_does(ssh, number):
    process = ssh("bash", "-c", WORKER, "worker")
    for _ in range(2):
        assert "--process" in process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0].count("told") == 2
    assert process.returncode in (128 + number, -number)


@pytest.mark.slow
def test_over_ssh_a_run_is_stopped_and_resumed(ssh, tmp_path):
    nano.write_text(tmp_path / "words.txt")
    run = tmp_path / "run"
    flags = "--model=nano --data words.txt --batch-size=8 --seq-len=32 --steps=20 --output=run"
    environment = {"PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    memopt = (sys.executable, "-c", PROGRAM, "pretrain")
    process = ssh(*memopt, *flags.split(), **environment)
    wait_for_step(process, run, 5)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert 5 <= metrics(run)[-1]["step"] < 20
    process = ssh(*memopt, "--resume", "--output=run", **environment)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.count("everything is in run") == 1
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))
