"""Starts a run from the parameters of another one, with its layers repeated if wanted."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from memopt.models.config import preset
from memopt.state.growth import grow_depth
from memopt.state.quantized_params import dequantize_params
from memopt.state.sharding import dense_like
from memopt.training.checkpoint import Checkpoints
from memopt.training.config import Config, Start, read_options
from memopt.training.describe import describe_run
from memopt.training.setup import Setup, store_params
from memopt.training.step import TrainState, init_state

#: Options of a run that belong to its own start.
OWN = ("init", "grow", "carry_state", "phases")

#: Sizes and options of a model that its parameters do not depend on.
FREE = ("param_dtype", "dtype", "remat")


def inherited_options(start: Start) -> dict[str, Any]:
    """Returns the options that a new run has from the one it starts from, unless it has others.

    Args:
        start: The run to start from.

    Raises:
        ValueError: There is none.
    """
    options = _options(start.init)
    there = Config.from_flat(options).architecture
    layers = there.num_layers or preset(there.model).num_layers
    own = {"num_layers": layers * start.grow} if start.grow > 1 else {}
    return {"option": [], **{name: x for name, x in options.items() if name not in OWN}, **own}


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """A run that another one starts from.

    Attributes:
        config: Its options.
        setup: Its training step, on the devices of the new run.
        state: Its newest state.
    """

    config: Config
    setup: Setup
    state: TrainState

    def schedule(self, config: Config) -> Config:
        """The options of the new run, whose schedule starts after the updates that are counted."""
        counted = self.config.phases[0].count + int(self.state.step - self.state.skipped)
        first, *more = config.phases
        count = counted if config.start.carry_state else 0
        return config.with_phases(dataclasses.replace(first, count=count), *more)

    def start(self, config: Config, setup: Setup) -> TrainState:
        """Returns the first state of the new run, with the shardings of its setup.

        Raises:
            ValueError: Its model differs in more than depth, or its optimizer from the one whose
                state it should take over.
        """
        self._check_model(config, setup)
        carries = config.start.carry_state
        if carries:
            self._check_optimizer(config)

        def grown(state: TrainState) -> TrainState:
            params = state.params if carries else self.setup.eval_params(state)
            kept = state.opt_state if carries else ()
            params, kept = grow_depth(params, kept, config.start.grow, tx=self.setup.tx)
            first = init_state(_stored_like(params, setup), setup.tx)
            return first._replace(opt_state=kept) if carries else first

        shardings = jax.tree.map(lambda x: x.sharding, setup.state)
        with jax.set_mesh(setup.mesh):
            return jax.jit(grown, out_shardings=shardings)(self.state)

    def taken_over(self, config: Config) -> str:
        """Says what the new run has from this one."""
        layers = self.setup.model_config.num_layers
        grows = f", its {layers} layers {config.start.grow} times" if config.start.grow > 1 else ""
        state = "is taken over, too" if config.start.carry_state else "starts anew"
        where = f"step {int(self.state.step)} of {config.start.init}"
        return f"from {where}{grows}; the optimizer's state {state}"

    def _check_model(self, config: Config, setup: Setup) -> None:
        there, here = self.setup.model_config, setup.model_config
        there = dataclasses.replace(there, num_layers=there.num_layers * config.start.grow)
        names = [field.name for field in dataclasses.fields(here) if field.name not in FREE]
        differing = [
            f"{name} is {getattr(there, name)} there and {getattr(here, name)} here"
            for name in names
            if getattr(there, name) != getattr(here, name)
        ]
        if differing:
            raise ValueError(
                f"init {str(config.start.init)!r} has another model, with grow={config.start.grow}:"
                f" {'; '.join(differing)}. Leave out --model, --num-layers and --vocab-size."
            )

    def _check_optimizer(self, config: Config) -> None:
        there, here = self.config, config
        pairs = {
            "optimizer": (there.optimization.optimizer, here.optimization.optimizer),
            "option": (there.optimizer_options, here.optimizer_options),
            "state": (there.optimization.state, here.optimization.state),
        }
        for name, (a, b) in pairs.items():
            if a != b:
                raise ValueError(
                    f"carry_state must be left out, since {name} is {a!r} in "
                    f"{str(config.start.init)!r} and {b!r} here."
                )


def read_origin(config: Config) -> Origin:
    """Reads the newest checkpoint of the run that a new one starts from; writes nothing.

    Args:
        config: The options of the new run, on whose devices the state is read.

    Raises:
        ValueError: There is no such run, or no whole checkpoint of it.
    """
    directory: Any = config.start.init
    there = Config.from_flat(_options(directory))
    # The devices and the batch are those of the new run.
    optimization = dataclasses.replace(
        there.optimization, accumulation=config.optimization.accumulation
    )
    setup = describe_run(
        dataclasses.replace(config, architecture=there.architecture, optimization=optimization)
    )
    restored = Checkpoints(directory / "checkpoints").restore(setup.state, set_aside=False)
    if restored is None:
        raise ValueError(f"init {str(directory)!r} has no checkpoint to start from yet.")
    return Origin(there, setup, restored[0])


def _options(directory: Path | None) -> dict[str, Any]:
    if directory is None or not (directory / "config.json").is_file():
        raise ValueError(f"init {str(directory)!r} is not the directory of a run.")
    return read_options(directory / "config.json")


def _stored_like(params: Any, setup: Setup) -> Any:
    """Parameters as they are stored in the state of `setup`."""
    describe = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    if describe(params) == describe(setup.state.params):
        return params
    cast = lambda x, like: x.astype(like.dtype)
    dense = jax.tree.map(cast, dequantize_params(params), dense_like(setup.state.params))
    return store_params(dense, setup.weights)
