"""Executes every notebook of this folder, and optionally saves its outputs.

python notebooks/run.py            # checks that they run
python notebooks/run.py --write    # also saves their outputs
"""

import argparse
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
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    if write:
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(notebook, path)


def main() -> None:
    """Reads the command line and runs the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    write = parser.parse_args().write
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        print(f"running {path.name}", file=sys.stderr)
        execute(path, write)


if __name__ == "__main__":
    main()
