"""`python -m scaledown.serving`, the same as `scaledown-serve`."""

import sys

from scaledown.commands import serve

sys.exit(serve())
