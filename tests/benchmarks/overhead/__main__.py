"""`python tests/benchmarks/overhead`: see `benchmarks.overhead`."""

import sys
from pathlib import Path

# The folder of the package's parent takes the place of the package's own, which Python put there.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.overhead.plan import main  # noqa: E402

main()
