"""Adapters to libraries that do not take an Optax transformation; each is imported when used."""

from memopt.integrations.keras import keras_optimizer as keras_optimizer
