"""Executes the notebooks of this folder, and optionally saves their outputs.

python notebooks/run.py                   # checks that all run
python notebooks/run.py --write compose   # runs one, and saves its outputs
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, write: bool = False) -> None:
    """Runs one notebook from its own folder; an error in a cell is raised.

    Args:
        path: the notebook.
        write: whether to replace the notebook by the executed one.
    """
    notebook = nbformat.read(path, as_version=4)
    # The tests set XLA_FLAGS to eight CPU devices; readers have one.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env=env)
    if write:
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(notebook, path)


def main() -> None:
    """Reads the command line and runs the notebooks."""
    paths = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # argparse compares the default of no names, [], with the choices, too.
    parser.add_argument("names", nargs="*", choices=[[], *paths], metavar="NAME")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    options = parser.parse_args()
    for name in options.names or paths:
        before = cpu_seconds()
        execute(paths[name], options.write)
        print(f"{name}: {cpu_seconds() - before:.0f} s of CPU", file=sys.stderr)


def cpu_seconds() -> float:
    """The CPU time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
