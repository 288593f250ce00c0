"""python -m ssl_exit COMMAND, as torchrun -m ssl_exit COMMAND needs."""

from ssl_exit.cli import main

if __name__ == "__main__":
    main()
