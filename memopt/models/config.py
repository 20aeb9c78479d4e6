"""Shapes and options of a LLaMA, and the published sizes by name."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from memopt.errors import check_above_zero, check_at_least, check_choice

Remat = Literal["none", "dots", "full"]
DType = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["llama3", "linear", "dynamic", "yarn"]
Activation = Literal["silu", "gelu_tanh"]
AttentionBias = Literal["none", "qkv", "qkvo"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A stretch of the rotary wavelengths, for contexts longer than the one first trained on.

    `kind` is `rope_type` at Hugging Face:

    - "llama3" multiplies wavelengths longer than `original_max_seq_len / low_freq_factor` by
      `factor`, keeps those shorter than `original_max_seq_len / high_freq_factor` and blends those
      between (Llama 3, arXiv 2407.21783).
    - "linear" multiplies all wavelengths by `factor`.
    - "yarn" keeps wavelengths of more than `beta_fast` turns within `original_max_seq_len`,
      multiplies those of fewer than `beta_slow` by `factor`, blends along the channels between, and
      multiplies scores by the square of an attention factor (YaRN, arXiv 2309.00071).
    - "dynamic" changes nothing up to `max_seq_len`, and a model takes no longer sequences.

    Attributes:
        factor: How many times longer the long wavelengths become.
        low_freq_factor: "llama3": fewer turns than this within the original context: stretched.
        high_freq_factor: "llama3": more turns than this within the original context: kept.
        original_max_seq_len: "llama3", "yarn": context length before the stretch.
        kind: One of the four above.
        attention_factor: "yarn": what queries and keys are multiplied by. None: 0.1 ln(factor) + 1.
        beta_fast: "yarn": more turns than this: kept.
        beta_slow: "yarn": fewer turns than this: stretched.
        truncate: "yarn": whether the blend begins and ends at whole channels.

    Raises:
        ValueError: If the kind is unknown, a number is not positive, or if two factors or betas
            are equal or in the wrong order.

    Example:
        >>> RopeScaling(factor=32.0).original_max_seq_len
        8192

    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    kind: RopeKind = "llama3"
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check_choice("kind of rope_scaling", self.kind, get_args(RopeKind))
        check_above_zero("factor of rope_scaling", self.factor)
        check_at_least("original_max_seq_len", self.original_max_seq_len, 1)
        ordered = {"llama3": ("low_freq_factor", "high_freq_factor")}
        ordered["yarn"] = ("beta_slow", "beta_fast")
        if self.kind in ordered:
            low, high = ordered[self.kind]
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} must be positive and less than "
                    f"{high}={getattr(self, high)}."
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
        rope_scaling: Stretch of the wavelengths, or None.
        norm_eps: Added to the mean square in RMSNorm.
        tied: Whether the output head is the transposed embedding.
        activation: Of the gate in the MLP: "silu", or "gelu_tanh" (GELU's tanh approximation).
        attention_bias: Which projections of attention add a bias.
        qk_norm: Whether each head's queries and keys pass through an RMSNorm before rotation.
        sliding_window: Number of positions each attends to, itself included. None: all before it.
        norm_offset: Whether the norms scale by 1 + their parameter, which begins at 0.
        scale_embedding: Whether the embedding is multiplied by the root of `hidden_size`.
        bos_id: Token that begins a document, or None; kept for Hugging Face's files.
        eos_ids: Tokens that end a text; kept for Hugging Face's files.
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
    activation: Activation = "silu"
    attention_bias: AttentionBias = "none"
    qk_norm: bool = False
    sliding_window: int | None = None
    norm_offset: bool = False
    scale_embedding: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    param_dtype: DType = "float32"
    dtype: DType = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))  # a list, if read from JSON
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                check_at_least(field.name, value, 1)
            elif get_origin(field.type) is Literal:
                check_choice(field.name, value, get_args(field.type))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; every key head must serve equally many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even.")
        if self.sliding_window is not None:
            check_at_least("sliding_window", self.sliding_window, 1)
        if not self.rope_theta > 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Inverts `dataclasses.asdict`, also of values that went through JSON.

        Args:
            values: Fields by name; those with a default may be missing.

        Raises:
            ValueError: A field is unknown, as one of a later version is.

        Example:
            >>> import json
            >>> config = preset("llama-3.2-1b")
            >>> text = json.dumps(dataclasses.asdict(config))
            >>> LlamaConfig.from_json(json.loads(text)) == config
            True

        """
        scaling = values.get("rope_scaling")
        try:
            return cls(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})
        except TypeError as error:
            raise ValueError(f"the shape of the model cannot be read: {error}.") from error


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> LlamaConfig:
    """A size with the first LLaMA's options, as far as `more` does not say otherwise."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers}
    attention = {"num_heads": heads, "num_kv_heads": heads, "head_dim": hidden // heads}
    return LlamaConfig(**{"vocab_size": 32000, **sizes, **attention, **more})


_llama_3 = functools.partial(
    _llama, vocab_size=128256, num_kv_heads=8, rope_theta=500000.0, norm_eps=1e-5
)

PRESETS = {
    "tiny": _llama(192, 512, 4, 4, vocab_size=264),
    "60m": _llama(512, 1376, 8, 8),
    "130m": _llama(768, 2048, 12, 12),
    "350m": _llama(1024, 2736, 24, 16),
    "1b": _llama(2048, 5461, 24, 32),
    "7b": _llama(4096, 11008, 32, 32),
    "13b": _llama(5120, 13824, 40, 40),
    "70b": _llama(8192, 28672, 80, 64, num_kv_heads=8),
    "llama-2-7b": _llama(4096, 11008, 32, 32, max_seq_len=4096, norm_eps=1e-5),
    "llama-3-8b": _llama_3(4096, 14336, 32, 32, max_seq_len=8192),
    "llama-3.2-1b": _llama_3(
        2048, 8192, 16, 32, max_seq_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True
    ),
}
"""The shapes of published models by name, as `memopt pretrain --model` takes them."""


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
    check_choice("model", name, PRESETS)
    return PRESETS[name]
