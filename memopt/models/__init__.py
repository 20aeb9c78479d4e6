"""Flax NNX models, their Hugging Face import and export, and the form that release takes models in.

`memopt.models.llama` needs Flax, `memopt.models.StackedModel` does not.
"""

from memopt.models.stacked import StackedModel as StackedModel
