# SPDX-License-Identifier: Apache-2.0
"""Conformance with the authors' recorded outputs: `python -m tests.conformance {ltmp|dgmr|das} FILE.npz`."""
