# SPDX-License-Identifier: Apache-2.0
"""The checker that `tests/conftest.py` puts around every function of vtjax: shapes, dtypes and types at run time."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As mypy reads annotations: an int is a float.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
