"""``python -m ssl_samix`` is ``samix``."""

from ssl_samix.cli.main import main

if __name__ == "__main__":
    main()
