# SPDX-License-Identifier: Apache-2.0
"""Parameters, multiply-accumulates, time, and records of what was measured. Knows specs and callables, no model."""
