"""`python -m stages` is `latentmill`."""

from stages.cli import main

if __name__ == "__main__":
    main(prog_name="latentmill")
