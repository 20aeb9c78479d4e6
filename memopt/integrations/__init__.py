"""Adapters to libraries that do not take an Optax transformation.

A library is imported when its adapter is called.
"""

from memopt.integrations.easydel import register_easydel as register_easydel
from memopt.integrations.keras import keras_optimizer as keras_optimizer
from memopt.integrations.levanter import register_levanter as register_levanter
from memopt.integrations.maxtext import maxtext_optimizer as maxtext_optimizer
