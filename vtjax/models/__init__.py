# SPDX-License-Identifier: Apache-2.0
"""Models that read a spec and call ops. Modules return `(y, aux)`: no `sow`, no hooks, no mutable state."""
