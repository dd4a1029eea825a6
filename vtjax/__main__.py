# SPDX-License-Identifier: Apache-2.0
"""`python -m vtjax`, the same as `vtjax`."""

import sys

from vtjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
