# SPDX-License-Identifier: Apache-2.0
"""One training loop over the `Task` contract (design, section 3)."""
