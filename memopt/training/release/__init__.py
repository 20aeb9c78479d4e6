"""The training step that updates each layer while the backward pass runs."""

from memopt.training.release.step import release_step as release_step
