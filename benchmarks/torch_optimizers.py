"""Torch's optimizers and the authors' own code, for comparison if they are installed.

Needs torch, and for some names apollo-torch (with bitsandbytes) or lion-pytorch.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class TorchOptimizer(NamedTuple):
    """One of torch's optimizers.

    Attributes:
        package: the module that contains it.
        build: builds it from the hidden matrices, the other parameters and a learning rate.
    """

    package: str
    build: Callable[[list[Any], list[Any], float], Any]


def _adamw(hidden: list[Any], rest: list[Any], learning_rate: float) -> Any:
    import torch

    return torch.optim.AdamW(hidden + rest, learning_rate, fused=True)


def _adafactor(hidden: list[Any], rest: list[Any], learning_rate: float) -> Any:
    import torch

    return torch.optim.Adafactor(hidden + rest, learning_rate)


def _lion(hidden: list[Any], rest: list[Any], learning_rate: float) -> Any:
    from lion_pytorch import Lion

    return Lion(hidden + rest, learning_rate)


def _apollo(**options: Any) -> Callable[[list[Any], list[Any], float], Any]:
    def build(hidden: list[Any], rest: list[Any], learning_rate: float) -> Any:
        from apollo_torch import APOLLOAdamW

        rank = {"rank": min(hidden[0].shape) // 4} | options
        projected = {"params": hidden, "proj": "random", "proj_type": "std", **rank}
        return APOLLOAdamW(
            [{"params": rest}, {**projected, "update_proj_gap": 200}], lr=learning_rate
        )

    return build


TORCH_OPTIMIZERS = {
    "torch_adamw": TorchOptimizer("torch", _adamw),
    "torch_adafactor": TorchOptimizer("torch", _adafactor),
    "torch_lion": TorchOptimizer("lion_pytorch", _lion),
    "torch_apollo": TorchOptimizer("apollo_torch", _apollo(scale=1.0, scale_type="channel")),
    "torch_apollo_mini": TorchOptimizer(
        "apollo_torch", _apollo(scale=128.0, scale_type="tensor", rank=1)
    ),
}


def installed() -> tuple[str, ...]:
    """The names in `TORCH_OPTIMIZERS` whose packages are installed."""
    return tuple(
        name
        for name, (package, _) in TORCH_OPTIMIZERS.items()
        if importlib.util.find_spec("torch") and importlib.util.find_spec(package)
    )


class TorchParameters:
    """One set of torch parameters with fixed gradients, for several optimizers in turn.

    Args:
        hidden: shapes ``(*stack, in, out)`` of the hidden matrices; each matrix of a stack becomes
            a separate parameter (out, in), as in torch models.
        rest: shapes of the other parameters.
        dtype: the dtype of all parameters.
        device: their device, "cpu" or "cuda".
    """

    def __init__(
        self,
        hidden: Sequence[tuple[int, ...]],
        rest: Sequence[tuple[int, ...]],
        dtype: str,
        device: str = "cpu",
    ) -> None:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        self.device = device

        def parameter(shape: tuple[int, ...]) -> Any:
            normal = lambda: torch.randn(
                shape, generator=generator, dtype=getattr(torch, dtype), device=device
            )
            new = torch.nn.Parameter(0.02 * normal())
            new.grad = 1e-3 * normal()
            return new

        matrices = [(s[-1], s[-2]) for s in hidden for _ in range(math.prod(s[:-2]))]
        self.hidden = [parameter(shape) for shape in matrices]
        self.rest = [parameter(shape) for shape in rest]

    def optimizer(self, name: str, learning_rate: float) -> Any:
        """Builds the optimizer of that name and initializes its state.

        Raises:
            ValueError: if it is not installed.
        """
        if name not in installed():
            package = TORCH_OPTIMIZERS[name].package.replace("_", "-")
            raise ValueError(f"{name} needs the package {package}: pip install {package}")
        optimizer = TORCH_OPTIMIZERS[name].build(self.hidden, self.rest, learning_rate)
        optimizer.step()
        return optimizer

    def wait(self) -> None:
        """Waits until the device is done."""
        import torch

        if self.device != "cpu":
            torch.accelerator.synchronize()


def state_bytes(optimizer: Any) -> int:
    """The bytes of all tensors in a torch optimizer's state, including a projector's fields."""
    return sum(t.nbytes for state in optimizer.state.values() for t in _tensors(state))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict) or hasattr(value, "__dict__"):
        for field in (value if isinstance(value, dict) else vars(value)).values():
            yield from _tensors(field)
