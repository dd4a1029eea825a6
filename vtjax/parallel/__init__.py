# SPDX-License-Identifier: Apache-2.0
"""Device meshes, sharding rules, attention over a mesh; nothing here knows a model."""

from vtjax.parallel.xattn import attend_over, cross_attention

__all__ = ["attend_over", "cross_attention"]
