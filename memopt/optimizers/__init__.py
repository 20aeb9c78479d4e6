"""Published methods, one per file, each registered in `memopt.optimizers.registry`."""

from typing import TYPE_CHECKING

from memopt.optimizers.adafactor import adafactor as adafactor
from memopt.optimizers.adagrad_norm import adagrad_norm as adagrad_norm
from memopt.optimizers.adalomo import adalomo as adalomo
from memopt.optimizers.adam_atan2 import adam_atan2 as adam_atan2
from memopt.optimizers.adam_mini import adam_mini as adam_mini
from memopt.optimizers.adopt import adopt as adopt
from memopt.optimizers.amsgrad import amsgrad as amsgrad
from memopt.optimizers.apollo import apollo as apollo
from memopt.optimizers.apollo import apollo_mini as apollo_mini
from memopt.optimizers.badam import badam as badam
from memopt.optimizers.by_partition import Common as Common
from memopt.optimizers.by_partition import matrices_and_rest as matrices_and_rest
from memopt.optimizers.came import came as came
from memopt.optimizers.fira import fira as fira
from memopt.optimizers.flora import flora as flora
from memopt.optimizers.frugal import frugal as frugal
from memopt.optimizers.galore import galore as galore
from memopt.optimizers.lamb import lamb as lamb
from memopt.optimizers.lars import lars as lars
from memopt.optimizers.ldadam import ldadam as ldadam
from memopt.optimizers.lion import lion as lion
from memopt.optimizers.lomo import lomo as lomo
from memopt.optimizers.mkor import mkor as mkor
from memopt.optimizers.muon import muon as muon
from memopt.optimizers.normuon import normuon as normuon
from memopt.optimizers.oasis import oasis as oasis
from memopt.optimizers.online_subspace_descent import (
    online_subspace_descent as online_subspace_descent,
)
from memopt.optimizers.racs import racs as racs
from memopt.optimizers.registry import available as available
from memopt.optimizers.registry import eval_params as eval_params
from memopt.optimizers.registry import optimizer as optimizer
from memopt.optimizers.rmnp import rmnp as rmnp
from memopt.optimizers.scale import scale as scale
from memopt.optimizers.sinkgd import sinkgd as sinkgd
from memopt.optimizers.slim_adam import slim_adam as slim_adam
from memopt.optimizers.sm3 import sm3 as sm3
from memopt.optimizers.soap import soap as soap
from memopt.optimizers.subtrack import subtrack as subtrack
from memopt.optimizers.tag import tag as tag

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted(
        (
            *("Common", "matrices_and_rest", "available", "eval_params", "optimizer"),
            *available("memopt"),
        )
    )
