"""Starts a run from the weights of another one, or of a Hugging Face model, grown if wanted."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from memopt.diagnostics import WithDiagnosticsState
from memopt.models import hugging_face, llama
from memopt.models.config import LlamaConfig, preset
from memopt.state.growth import grow_depth
from memopt.state.quantized_params import dequantize_params
from memopt.state.sharding import dense_like
from memopt.text.tokenizer import TEMPLATE
from memopt.training.checkpoint import Checkpoints
from memopt.training.config import Config, read_options
from memopt.training.describe import describe_run
from memopt.training.directory import is_run, kept_tokenizer
from memopt.training.setup import Setup, store_params
from memopt.training.step import TrainState, init_state

#: Options of a run that belong to its own start.
OWN = ("init", "grow", "carry_state", "phases")

#: Sizes and options of a model that its parameters do not depend on.
FREE = ("param_dtype", "dtype", "remat")


def inherited_options(directory: Path, grow: int) -> dict[str, Any]:
    """Returns the options that a new run has from what it starts from, unless it has others.

    Of a Hugging Face model, these are its name, its shapes and its tokenizer. The chat template
    of a run on chats is its copy.

    Args:
        directory: The run or the model to start from.
        grow: How often its layers are repeated.

    Raises:
        ValueError: There is none.
    """
    if is_run("init", directory):
        options = read_options(directory / "config.json")
        there = Config.from_flat(options).architecture
        layers = there.num_layers or (there.shape or preset(there.model)).num_layers
        tokenizer = kept_tokenizer(directory, options.get("tokenizer", "bytes"))
        options = {name: x for name, x in options.items() if name not in OWN}
        options = {"option": [], **options, "tokenizer": tokenizer}
        if options.get("format") == "chats":
            options["chat_template"] = str(directory / TEMPLATE)
    else:
        shape = hugging_face.read_config(directory)
        layers = shape.num_layers
        options = {
            "model": directory.resolve().name,
            "shape": dataclasses.asdict(shape),
            "tokenizer": str(directory),
        }
    return options | ({"num_layers": layers * grow} if grow > 1 else {})


@dataclasses.dataclass(frozen=True, eq=False)
class Origin(abc.ABC):
    """A model that a run starts from.

    Attributes:
        model_config: Its shapes.
    """

    model_config: LlamaConfig

    def schedule(self, config: Config) -> Config:
        """The options of the new run, whose schedule starts after the updates that are counted."""
        return config

    def check(self, config: Config, setup: Setup) -> None:
        """Raises unless a run with these options can start from it.

        Raises:
            ValueError: Its model differs in more than depth, or it lacks what should be taken over.
        """
        there, here = self.model_config, setup.model_config
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

    @abc.abstractmethod
    def start(self, config: Config, setup: Setup) -> TrainState:
        """Returns the first state of the new run, with the shardings of its setup."""

    @abc.abstractmethod
    def taken_over(self, config: Config) -> str:
        """Says what the new run has from it."""

    def _grows(self, config: Config) -> str:
        layers, times = self.model_config.num_layers, config.start.grow
        return f", its {layers} layers {times} times" if times > 1 else ""


@dataclasses.dataclass(frozen=True, eq=False)
class RunOrigin(Origin):
    """A run that another one starts from.

    Attributes:
        config: Its options.
        setup: Its training step, on the devices of the new run.
        state: Its newest state.
    """

    config: Config
    setup: Setup
    state: TrainState

    def schedule(self, config: Config) -> Config:  # noqa: D102
        counted = self.config.phases[0].count + int(self.state.step - self.state.skipped)
        first, *more = config.phases
        count = counted if config.start.carry_state else 0
        return config.with_phases(dataclasses.replace(first, count=count), *more)

    def check(self, config: Config, setup: Setup) -> None:  # noqa: D102
        super().check(config, setup)
        there, here = self.config, config
        pairs = {
            "optimizer": (there.optimization.optimizer, here.optimization.optimizer),
            "option": (there.optimizer_options, here.optimizer_options),
            "state": (there.optimization.state, here.optimization.state),
        }
        for name, (a, b) in pairs.items() if config.start.carry_state else ():
            if a != b:
                raise ValueError(
                    f"carry_state must be left out, since {name} is {a!r} in "
                    f"{str(config.start.init)!r} and {b!r} here."
                )

    def start(self, config: Config, setup: Setup) -> TrainState:  # noqa: D102
        if not config.start.carry_state:
            return _first_state(self.setup.eval_params(self.state), config, setup)

        def grown(state: TrainState) -> TrainState:
            params, kept = grow_depth(
                state.params, state.opt_state, config.start.grow, tx=self.setup.tx
            )
            first = init_state(_stored_like(params, setup), setup.tx)
            # Diagnostics start anew: the new run may have none, or at other steps.
            kept = kept.inner if isinstance(kept, WithDiagnosticsState) else kept
            if isinstance(first.opt_state, WithDiagnosticsState):
                kept = first.opt_state._replace(inner=kept)
            return first._replace(opt_state=kept)

        with jax.set_mesh(setup.mesh):
            return jax.jit(grown, out_shardings=_shardings(setup.state))(self.state)

    def taken_over(self, config: Config) -> str:  # noqa: D102
        state = "is taken over, too" if config.start.carry_state else "starts anew"
        where = f"step {int(self.state.step)} of {config.start.init}"
        return f"from {where}{self._grows(config)}; the optimizer's state {state}"


@dataclasses.dataclass(frozen=True, eq=False)
class ModelOrigin(Origin):
    """A Hugging Face model that a run starts from.

    Attributes:
        directory: Its directory.
        tensors: Its opened weights.
        codec: How they are quantised, see `memopt.quantize_params`; None: they are not.
    """

    directory: Path
    tensors: Mapping[str, Any]
    codec: str | None

    def check(self, config: Config, setup: Setup) -> None:  # noqa: D102
        super().check(config, setup)
        if config.start.carry_state:
            raise ValueError(
                f"carry_state must be left out, since init {str(self.directory)!r} is a model, "
                "which has no optimizer state."
            )
        hugging_face.check_params(self.directory, self.tensors, self._shapes(setup))

    def start(self, config: Config, setup: Setup) -> TrainState:  # noqa: D102
        shapes = self._shapes(setup)
        quantizes = setup.weights and not self.codec
        store = functools.partial(store_params, weights=setup.weights) if quantizes else None
        params = hugging_face.read_params(
            self.directory, self.tensors, shapes, _shardings(shapes), store
        )
        return _first_state(params, config, setup)

    def taken_over(self, config: Config) -> str:  # noqa: D102
        return f"from the weights of {self.directory}{self._grows(config)}"

    def _shapes(self, setup: Setup) -> Any:
        """The parameters as the files have them, on the devices of the new run."""
        config = dataclasses.replace(setup.model_config, num_layers=self.model_config.num_layers)
        return store_params(llama.abstract_params(config, setup.mesh), self.codec)


def read_origin(directory: Path, config: Config) -> Origin:
    """Reads what a new run starts from; writes nothing.

    Of a run, the newest checkpoint; of a model, its shapes.

    Args:
        directory: The run or the model.
        config: The options of the new run, on whose devices the state is read.

    Raises:
        ValueError: There is no such run or model, or no whole checkpoint of it.
    """
    if not is_run("init", directory):
        model_config = hugging_face.read_config(directory)
        tensors = hugging_face.open_tensors(directory)
        return ModelOrigin(model_config, directory, tensors, hugging_face.read_codec(directory))
    there = Config.from_flat(read_options(directory / "config.json"))
    # The devices and the batch are those of the new run.
    optimization = dataclasses.replace(
        there.optimization, accumulation=config.optimization.accumulation
    )
    run = dataclasses.replace(config.run, log_diagnostics=there.run.log_diagnostics)
    setup = describe_run(
        dataclasses.replace(
            config, architecture=there.architecture, optimization=optimization, run=run
        ),
        trace=False,
    )
    restored = Checkpoints(directory / "checkpoints").restore(setup.state, set_aside=False)
    if restored is None:
        raise ValueError(f"init {str(directory)!r} has no checkpoint to start from yet.")
    return RunOrigin(setup.model_config, there, setup, restored[0])


def _first_state(params: Any, config: Config, setup: Setup) -> TrainState:
    """The state of a new run with these parameters, grown and stored as its setup says."""

    def stored(params: Any) -> Any:
        return _stored_like(grow_depth(params, (), config.start.grow)[0], setup)

    def rest(params: Any) -> TrainState:
        return init_state(params, setup.tx)._replace(params=())

    shardings = _shardings(setup.state)
    with jax.set_mesh(setup.mesh):
        if config.start.grow > 1 or not _is_like(params, setup.state.params):
            params = jax.jit(stored, out_shardings=shardings.params)(params)
        first = jax.jit(rest, out_shardings=shardings._replace(params=()))(params)
    return first._replace(params=params)


def _stored_like(params: Any, setup: Setup) -> Any:
    """Parameters as they are stored in the state of `setup`."""
    if _is_like(params, setup.state.params):
        return params
    cast = lambda x, like: x.astype(like.dtype)
    dense = jax.tree.map(cast, dequantize_params(params), dense_like(setup.state.params))
    return store_params(dense, setup.weights)


def _is_like(params: Any, like: Any) -> bool:
    describe = lambda tree: (
        jax.tree.structure(tree),
        [(x.shape, x.dtype) for x in jax.tree.leaves(tree)],
    )
    return describe(params) == describe(like)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
