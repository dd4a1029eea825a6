# SPDX-License-Identifier: Apache-2.0
"""Imported before timm by the recording scripts.

timm needs torchvision's Python part only, which refuses to import when its compiled operators were built for another
torch. Declaring the two operators that it looks up at import is enough.
"""

from __future__ import annotations

import torch

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:  # only timm needs it
    pass
except RuntimeError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
