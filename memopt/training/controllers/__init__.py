"""Controllers by name, for `memopt pretrain --controller NAME`."""

from memopt.choices import Choice as Choice
from memopt.training.controllers.registry import CONTROLLERS as CONTROLLERS
from memopt.training.controllers.registry import controller as controller
