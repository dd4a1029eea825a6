# SPDX-License-Identifier: Apache-2.0
"""Curves and tables from what runs leave behind. Needs numpy; matplotlib (`[viz]`) only where a figure is drawn."""
