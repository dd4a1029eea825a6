# SPDX-License-Identifier: Apache-2.0
"""Images and labels: sources by name, transforms, and batches on grain."""

from vtjax.data.augment import Augment
from vtjax.data.loader import Batch, ImageData, from_config
from vtjax.data.sources import Example, Source, open_source

__all__ = ["Augment", "Batch", "Example", "ImageData", "Source", "from_config", "open_source"]
