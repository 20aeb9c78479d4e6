"""One file a published method."""

from memopt.optimizers.adafactor import adafactor as adafactor
from memopt.optimizers.adalomo import adalomo as adalomo
from memopt.optimizers.apollo import apollo as apollo
from memopt.optimizers.apollo import apollo_mini as apollo_mini
from memopt.optimizers.by_partition import matrices_and_rest as matrices_and_rest
from memopt.optimizers.lion import lion as lion
from memopt.optimizers.lomo import lomo as lomo
from memopt.optimizers.registry import available as available
from memopt.optimizers.registry import optimizer as optimizer
