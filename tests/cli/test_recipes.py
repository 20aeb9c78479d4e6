"""The launch recipes are complete: the shell and `memopt pretrain` understand every line."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memopt.cli.pretrain import parse
from memopt.models import llama
from tests.cli.test_pretrain import ROOT, metrics
from tests.training import nano

RECIPES = ROOT / "docs" / "recipes"


def jobset():
    (job,) = yaml.safe_load((RECIPES / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def scripts():
    """{recipe: the shell script in it}"""
    (container,) = jobset()["template"]["spec"]["containers"]
    files = {name: (RECIPES / name).read_text() for name in ("slurm.sh", "ssh.sh")}
    return files | {"jobset.yaml": container["args"][0]}


def test_no_recipe_is_left_out():
    assert {path.name for path in RECIPES.iterdir()} == set(scripts())


@pytest.mark.parametrize("name", ["slurm.sh", "ssh.sh", "jobset.yaml"])
def test_the_shell_understands_it(name):
    done = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "devices"), [("slurm.sh", 32), ("jobset.yaml", 16)])
def test_memopt_understands_its_options(name, devices):
    text = scripts()[name].replace("\\\n", " ")
    (command,) = re.findall(r"memopt pretrain (.*) \"\$\{resume\[@\]\}\"", text)
    config = parse(shlex.split(command))
    assert config.run.mesh == f"fsdp={devices}"
    assert config.text.batch_size % devices == 0
    assert llama.preset(config.architecture.model).max_seq_len >= config.text.seq_len


def test_devices_add_up():
    spec = jobset()
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == 16
    assert spec["parallelism"] == spec["completions"]
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", scripts()["slurm.sh"]))
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == 32
    assert options["ntasks-per-node"] == options["gpus-per-node"]


@pytest.mark.slow
def test_by_ssh(tmp_path):
    """With a stand-in for ssh, which runs the command here."""
    nano.write_text(tmp_path / "words.txt")
    program = (
        "import sys; from tests.training import nano; nano.install(); "
        "from memopt.cli.main import main; main()"
    )
    for name, content in {
        "ssh": '#!/usr/bin/env bash\nshift\nexec bash -c "$*"\n',
        "memopt": f'#!/usr/bin/env bash\nexec {sys.executable} -c "{program}" "$@"\n',
    }.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SSH": "ssh",
        "COORDINATOR": "127.0.0.1:43217",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    flags = "--model=nano --data=words.txt --steps=3 --seq-len=32 --eval-tokens=64 --output=run"
    command = [RECIPES / "ssh.sh", "one two", *flags.split(), "--mesh=data=2,fsdp=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 3
    assert json.loads((Path(tmp_path) / "run" / "config.json").read_text())["steps"] == 3
