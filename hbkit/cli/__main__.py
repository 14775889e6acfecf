"""``python -m hbkit.cli``."""

from hbkit.cli.main import main

if __name__ == "__main__":
    main(prog_name="hbkit")
