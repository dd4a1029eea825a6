# SPDX-License-Identifier: Apache-2.0
"""Device meshes and sharding rules; nothing here knows a model."""
