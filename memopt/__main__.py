"""`python -m memopt` is the command `memopt`."""

from memopt.cli.main import main

if __name__ == "__main__":
    main()
