"""Shapes and options of a LLaMA, and the published sizes by name."""

import dataclasses
import difflib
from typing import Literal, get_args

Remat = Literal["none", "dots", "full"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths (`rope_type: llama3` at Hugging Face).

    Wavelengths longer than `original_max_seq_len / low_freq_factor` are multiplied by `factor`,
    those shorter than `original_max_seq_len / high_freq_factor` are kept, those between are
    blended.

    Attributes:
        factor: How many times longer the long wavelengths become.
        low_freq_factor: Fewer turns than this within the original context: stretched.
        high_freq_factor: More turns than this within the original context: kept.
        original_max_seq_len: Context length before the stretch.

    Raises:
        ValueError: If the two frequency factors are equal or in the wrong order.

    Example:
        >>> RopeScaling(factor=32.0).original_max_seq_len
        8192

    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and less than "
                f"high_freq_factor={self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a LLaMA, in plain values that can be written to JSON and read back.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Number of equal blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; a divisor of `num_heads`.
        head_dim: Width of one head; even, usually `hidden_size // num_heads`.
        max_seq_len: Longest sequence the model accepts.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Llama 3's stretch of the wavelengths, or None.
        norm_eps: Added to the mean square in RMSNorm.
        tied: Whether the output head is the transposed embedding.
        param_dtype: Type the parameters are stored in.
        dtype: Type the blocks compute in; norm statistics, softmax and loss are in float32.
        remat: What the backward pass recomputes: "none" keeps every intermediate array, "dots"
            the results of the weight matmuls, "full" only the input of each block.

    Raises:
        ValueError: If the sizes do not fit together or an option is unknown.

    Example:
        >>> import dataclasses
        >>> dataclasses.replace(preset("60m"), dtype="bfloat16", remat="full").hidden_size
        512

    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    param_dtype: DType = "float32"
    dtype: DType = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; every key head must serve equally many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even.")
        for name, allowed in (("param_dtype", DType), ("dtype", DType), ("remat", Remat)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}; choose one of {get_args(allowed)}.")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The number of pieces that each logical axis of the parameters can be cut into.

        `heads` and `kv_heads` count heads, not channels, since a head is never cut.
        """
        return {
            "layers": self.num_layers,
            "embed": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "mlp": self.intermediate_size,
            "vocab": self.vocab_size,
        }


def _plain(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """The first LLaMA's layout: every query head has a key head of its own."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
    )


_LLAMA_3 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=8192,
    rope_theta=500000.0,
    norm_eps=1e-5,
)

PRESETS = {
    "tiny": dataclasses.replace(_plain(192, 512, 4, 4), vocab_size=264),
    "60m": _plain(512, 1376, 8, 8),
    "130m": _plain(768, 2048, 12, 12),
    "350m": _plain(1024, 2736, 24, 16),
    "1b": _plain(2048, 5461, 24, 32),
    "7b": _plain(4096, 11008, 32, 32),
    "13b": _plain(5120, 13824, 40, 40),
    "70b": dataclasses.replace(_plain(8192, 28672, 80, 64), num_kv_heads=8),
    "llama-2-7b": dataclasses.replace(_plain(4096, 11008, 32, 32), max_seq_len=4096, norm_eps=1e-5),
    "llama-3-8b": _LLAMA_3,
    "llama-3.2-1b": dataclasses.replace(
        _LLAMA_3,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        max_seq_len=131072,
        rope_scaling=RopeScaling(factor=32.0),
        tied=True,
    ),
}


def preset(name: str) -> LlamaConfig:
    """The configuration of a published size.

    "tiny" is made for bytes on a laptop; "60m" to "13b" are the shapes of the GaLore and APOLLO
    papers (arXiv 2403.03507, 2412.05270), and "70b" is Llama 2's; the rest are Meta's releases.

    Args:
        name: One of `PRESETS`.

    Returns:
        The configuration, float32 throughout; change it with `dataclasses.replace`.

    Raises:
        ValueError: If no preset has that name.

    Example:
        >>> preset("7b").num_layers
        32

    """
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"Unknown model {name!r}; did you mean {nearest!r}? Available: {', '.join(PRESETS)}."
    )
