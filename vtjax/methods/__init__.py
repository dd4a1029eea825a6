# SPDX-License-Identifier: Apache-2.0
"""The methods, one file per paper: spec edit, map of the parameters, what goes into the model's slots."""
