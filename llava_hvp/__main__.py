"""`python -m llava_hvp` is `llava-hvp`."""

from __future__ import annotations

import sys

from llava_hvp.cli import main

if __name__ == "__main__":
    sys.exit(main())
