# SPDX-License-Identifier: Apache-2.0
"""Images and labels, and questions about images: sources by name, transforms, and batches on grain."""

from vtjax.data.augment import Augment
from vtjax.data.loader import Batch, ImageData, from_config
from vtjax.data.question_loader import QuestionData
from vtjax.data.questions import Questions, baselines, open_questions
from vtjax.data.sources import Example, Source, open_source
from vtjax.data.tokenizer import Tokenizer, WordTokenizer

__all__ = [
    "Augment",
    "Batch",
    "Example",
    "ImageData",
    "QuestionData",
    "Questions",
    "Source",
    "Tokenizer",
    "WordTokenizer",
    "baselines",
    "from_config",
    "open_questions",
    "open_source",
]
