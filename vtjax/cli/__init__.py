# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command; `config` reads configs, `assemble` builds what they describe."""
