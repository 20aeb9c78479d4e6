"""Runs the command `memopt` as `python -m memopt`."""

from memopt.cli.main import main

if __name__ == "__main__":
    main()
