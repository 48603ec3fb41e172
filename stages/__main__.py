"""Run `latentmill` as `python -m stages`."""

from stages.cli import main

if __name__ == "__main__":
    main(prog_name="latentmill")
