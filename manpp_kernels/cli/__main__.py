"""``python -m manpp_kernels.cli`` is ``manpp``."""

import sys

from manpp_kernels.cli import main

sys.exit(main())
