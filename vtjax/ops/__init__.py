# SPDX-License-Identifier: Apache-2.0
"""The papers' equations as pure functions of arrays and ints: no Flax, no config, no I/O."""
