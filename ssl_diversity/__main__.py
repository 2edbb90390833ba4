"""`python -m ssl_diversity` is `ssl-diversity`."""

import sys

from ssl_diversity.cli import main

if __name__ == "__main__":
    sys.exit(main())
