"""Say what a model keeps of each sequence between two tokens, layer by layer, from its config alone. Arithmetic only.

Full attention keeps keys and values of every token, and a sliding window those of the last tokens. Multi-head latent
attention keeps one latent that all heads share. Recurrent layers keep a state of constant size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from shardprep_runtime.errors import LayoutError, quote

from ..layout.rules import text_config

STATE_BYTES: Final = 4
"""Bytes of one number of a recurrent state, unless the config names a dtype: it is summed over the whole sequence."""

BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of one number, by the names that configs give dtypes."""

HEAD_DIM: Final = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "qwen3_moe": 128}
"""Model type -> default width of a head, where it is not hidden size / heads."""

INDEX_SCALE: Final = 4
"""Bytes of the scale that each 128 numbers of DeepSeek's fp8 index of keys share."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The bytes that one layer keeps of each sequence."""

    kind: str
    """The layer's type as configs name it: full_attention, sliding_attention, linear_attention, ..."""
    token: int = 0
    """Bytes that a token takes in one KV head, or in the whole layer where `heads` is 0."""
    heads: int = 0
    """KV heads, which tensor ranks share as they share their projections; 0: each rank keeps all (a latent)."""
    window: int | None = None
    """Tokens that the layer keeps at most; None: all."""
    state: int = 0
    """Bytes that a sequence takes, however long it is."""
    units: int = 1
    """Heads by which tensor ranks share the state; 1: each rank keeps all of it."""
    guessed: bool = False
    """Whether the type is unknown, so that the layer is counted as full attention."""

    def uncut(self) -> Kept:
        """The same layer where tensor ranks do not share it: each rank keeps everything."""
        return replace(self, token=self.token * max(self.heads, 1), heads=0, units=1)

    def per_token(self, ranks: int) -> int:
        """Bytes that one more token takes on each of `ranks` tensor ranks, while the window has room."""
        return self.token * (_share(self.heads, ranks) if self.heads else 1)

    def of_sequence(self, tokens: int, ranks: int) -> int:
        """Bytes that a sequence takes on each tensor rank.

        Args:
            tokens: Length of the sequence.
            ranks: Number of tensor ranks.
        """
        held = tokens if self.window is None else min(tokens, self.window)
        return self.per_token(ranks) * held + self.constant(ranks)

    def constant(self, ranks: int) -> int:
        """Bytes that a sequence takes before its first token, on each of `ranks` tensor ranks."""
        return self.state * _share(self.units, ranks) // self.units


def _share(units: int, ranks: int) -> int:
    """The heads that one of `ranks` tensor ranks holds. A head is never split: ranks share it once heads run out."""
    if units % ranks == 0:
        return units // ranks
    return 1 if ranks % units == 0 else units


def read_kept(
    config: Mapping[str, Any], layers: int, *, kv_bytes: int, dtype_bytes: int, latent: bool = True
) -> tuple[Kept, ...]:
    """Read from a config.json what each layer keeps of a sequence.

    Args:
        layers: Number of layers.
        kv_bytes: Bytes of one number of the KV cache.
        dtype_bytes: Bytes of one number in the model's dtype, in which other state is kept.
        latent: Whether the engine keeps the latent of MLA (vLLM, SGLang), or the heads made from it (transformers).

    Raises:
        LayoutError: Where the config lacks a number that is needed.
    """
    reader = _Reader(text_config(config), layers, kv_bytes, dtype_bytes, latent)
    kinds = _kinds(reader)
    if len(kinds) < layers:
        raise LayoutError(f"config.json names the kinds of {len(kinds)} layers, the model has {layers}")
    return tuple(reader.kept(kind, i) for i, kind in enumerate(kinds[:layers]))


class _Reader:
    """Reads from one config what its layers keep."""

    def __init__(
        self, config: Mapping[str, Any], layers: int, kv_bytes: int, dtype_bytes: int, latent: bool
    ) -> None:
        self.config = config
        self.layers = layers
        self.kv_bytes = kv_bytes
        self.dtype_bytes = dtype_bytes
        self.latent = latent
        named = config.get("mamba_ssm_cache_dtype") or config.get("mamba_ssm_dtype")
        self.state_bytes = BYTES.get(str(named), STATE_BYTES)
        self.model_type = str(config.get("model_type") or "")

    def find(self, *keys: str, of: Mapping[str, Any] | None = None) -> int | None:
        """Give the number under the first of `keys` that the config has.

        Args:
            of: The config to look in; default: the whole one.
        """
        for key in keys:
            found = (self.config if of is None else of).get(key)
            if found is None or found == "auto":
                continue
            if type(found) is not int or found < 0:
                raise LayoutError(f"config.json: {key} is {quote(found)}, expected a number of at least 0")
            return found
        return None

    def need(self, *keys: str, of: Mapping[str, Any] | None = None) -> int:
        """Give the number as `find` does, and refuse a config that lacks it.

        Args:
            of: The config to look in; default: the whole one.

        Raises:
            LayoutError: Where none of the keys has a number above 0.
        """
        found = self.find(*keys, of=of)
        if not found:
            raise LayoutError(f"config.json lacks what the KV cache depends on: {' or '.join(keys)}")
        return found

    def list_of(self, key: str) -> list[Any] | None:
        found = self.config.get(key)
        return found if isinstance(found, list) and found else None

    # ------------------------------------------------------------------------------------------------- one layer

    def kept(self, kind: str, layer: int) -> Kept:
        match kind:
            case "full_attention" | "attention" | "global":
                return self.shared(layer) or self.attention("full_attention", layer)
            case "sliding_attention" | "local":
                window = self.need("sliding_window", "attention_window_size", "window_size")
                return self.shared(layer) or self.attention("sliding_attention", layer, window=window)
            case "chunked_attention":
                return self.attention(kind, layer, window=self.need("attention_chunk_size"))
            case "indexed_attention":  # DeepSeek 3.2
                return self.attention(kind, layer)
            case "linear_attention" | "gated_delta_net" | "kimi_delta_attention":
                return self.linear(kind) or self.guessed(kind, layer)
            case "mamba" | "mamba2" | "mamba1":
                return self.mamba(kind)
            case "hybrid" | "parallel_hybrid" if self.is_mamba():
                both, attention = self.mamba("hybrid"), self.attention("hybrid", layer)
                return Kept("hybrid", attention.token, attention.heads, None, both.state, both.units)
            case "conv":
                width = self.need("conv_L_cache", "conv_kernel") - 1
                return Kept(kind, state=self.need("hidden_size") * width * self.dtype_bytes)
            case "recurrent":
                lru = self.find("lru_width") or self.need("hidden_size")
                conv = lru * ((self.find("conv1d_width") or 4) - 1) * self.dtype_bytes
                return Kept(kind, state=lru * self.state_bytes + conv)
            case "moe" | "mlp" | "none":
                return Kept("none")
        return self.guessed(kind, layer)

    def guessed(self, kind: str, layer: int) -> Kept:
        """Count a layer of unknown type as full attention, which keeps the most.

        Args:
            kind: The type that the config names.
            layer: Number of the layer.
        """
        return replace(self.attention(kind, layer), guessed=True)

    def is_mamba(self) -> bool:
        return self.find("mamba_d_state", "ssm_state_size", "state_size") is not None

    def attention(self, kind: str, layer: int, *, window: int | None = None) -> Kept:
        rope, latent = self.find("qk_rope_head_dim"), self.find("kv_lora_rank")
        if rope and latent:
            return self.multi_head_latent(kind, latent, rope)
        every, dim = self.heads(), self.head_dim()
        kv = self.kv_heads(every)
        # Gemma 4: full attention has heads of another size, and may keep its keys alone
        if kind == "full_attention" and self.find("global_head_dim"):
            dim = self.need("global_head_dim")
            kv = self.find("num_global_key_value_heads") or kv
        values = self.find("v_head_dim") or dim if not latent else dim
        return Kept(kind, (dim + values) * self.kv_bytes, kv, window)

    def multi_head_latent(self, kind: str, latent: int, rope: int) -> Kept:
        twice = 2 if self.model_type == "longcat_flash" else 1  # each of its layers has two attentions
        if not self.latent:
            keys = self.need("qk_nope_head_dim") + rope
            return Kept(kind, twice * (keys + self.need("v_head_dim")) * self.kv_bytes, self.heads())
        index = (
            self.find("index_head_dim") or 0
        )  # DeepSeek 3.2 keeps a key in fp8, and its scale, of each token
        return Kept(kind, twice * (latent + rope) * self.kv_bytes + index + -(-index // 128) * INDEX_SCALE)

    def heads(self) -> int:
        return self.need("num_attention_heads", "n_head", "n_heads", "num_heads")

    def head_dim(self) -> int:
        found = self.find("head_dim", "attention_head_dim", "kv_channels", "d_kv") or HEAD_DIM.get(
            self.model_type
        )
        return found or self.need("hidden_size", "n_embd", "d_model") // self.heads()

    def kv_heads(self, heads: int) -> int:
        attention = self.config.get("attn_config")
        if isinstance(attention, Mapping):
            return self.find("kv_n_heads", of=attention) or heads
        if self.model_type == "falcon" and not self.config.get("new_decoder_architecture"):
            return 1 if self.config.get("multi_query", True) else heads
        if self.model_type == "gpt_bigcode" and self.config.get("multi_query", True):
            return 1
        return self.find("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads

    def shared(self, layer: int) -> Kept | None:
        """Nothing is kept by the last layers of Gemma 3n and 4, which use the KV cache of earlier ones; None elsewhere."""
        borrowed = self.find("num_kv_shared_layers") or 0
        return Kept("none") if layer >= self.layers - borrowed > 0 else None

    def linear(self, kind: str) -> Kept | None:
        """Linear attention keeps a matrix per head, and the last inputs of a short convolution; None for unknown types."""
        own = self.config.get("linear_attn_config")
        kimi = own if isinstance(own, Mapping) else self.config
        prefix = "" if kimi is own else "linear_"
        heads = self.find(f"{prefix}num_heads", of=kimi)
        if heads and kimi.get(f"{prefix}head_dim"):
            dim = self.need(f"{prefix}head_dim", of=kimi)
            width = self.need("short_conv_kernel_size", "linear_conv_kernel_dim", of=kimi) - 1
            conv = 3 * heads * dim * width * self.dtype_bytes
            return Kept(kind, state=heads * dim * dim * self.state_bytes + conv, units=heads)
        values = self.find("linear_num_value_heads")
        if values:  # gated delta nets
            keys = self.need("linear_num_key_heads")
            key, value = self.need("linear_key_head_dim"), self.need("linear_value_head_dim")
            channels = 2 * keys * key + values * value
            conv = channels * (self.need("linear_conv_kernel_dim") - 1) * self.dtype_bytes
            return Kept(kind, state=values * key * value * self.state_bytes + conv, units=keys)
        if self.is_mamba():  # newer configs call Mamba's layers linear attention
            return self.mamba(kind)
        if not self.model_type.startswith("minimax"):
            return None
        heads, dim = self.heads(), self.head_dim()
        return Kept(kind, state=heads * dim * dim * self.state_bytes, units=heads)

    def mamba(self, kind: str) -> Kept:
        size = self.need("mamba_d_state", "ssm_state_size", "state_size")
        width = self.need("mamba_d_conv", "conv_kernel") - 1
        hidden = self.need("hidden_size")
        expand = self.find("mamba_expand", "expand") or 2
        heads = self.find("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
        if heads is None and self.model_type == "mamba2":
            heads = self.need("num_heads")
        if heads is None:  # Mamba 1 has a state for each channel
            inner = (
                self.find("intermediate_size") if "mamba" in self.model_type else None
            ) or expand * hidden
            return Kept(kind, state=inner * (size * self.state_bytes + width * self.dtype_bytes), units=inner)
        dim = self.find("mamba_d_head", "mamba_head_dim", "mamba_headdim") or expand * hidden // heads
        groups = self.find("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
        conv = (heads * dim + 2 * groups * size) * width * self.dtype_bytes
        state = heads * dim * size * self.state_bytes
        return Kept(kind, state=state + conv, units=heads)


# --------------------------------------------------------------------------------------------- which layer is what


def _kinds(reader: _Reader) -> Sequence[str]:
    """The type of each layer, from the first key of the config that gives it."""
    layers, config = reader.layers, reader.config
    for key in ("layer_types", "layers_block_type"):
        named = reader.list_of(key)
        if named:
            return [str(kind) for kind in named]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        letters = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
        return [letters.get(letter, letter) for letter in pattern]
    cycle = reader.list_of("block_types") or reader.list_of("_block_types")
    if cycle:
        return [("local" if cycle[i % len(cycle)] == "attention" else "recurrent") for i in range(layers)]
    own = config.get("linear_attn_config")
    if isinstance(own, Mapping) and isinstance(own.get("full_attn_layers"), list):
        return _with(layers, (n - 1 for n in own["full_attn_layers"]), "linear_attention")
    flags = reader.list_of("attn_type_list")
    if flags:
        return ["full_attention" if flag else "linear_attention" for flag in flags]
    for key, other in (("attn_layer_indices", "mamba"), ("full_attn_idxs", "conv")):
        numbers = reader.list_of(key)
        if numbers:
            return _with(layers, numbers, other)
    every = reader.find("attn_layer_period")
    if every:
        return _with(layers, range(reader.find("attn_layer_offset") or 0, layers, every), "mamba")
    every = reader.find("full_attention_interval")
    if every or reader.model_type == "qwen3_next":
        step = every or 4
        return _with(layers, range(step - 1, layers, step), "linear_attention")
    if reader.model_type in ("mamba", "mamba2", "falcon_mamba"):
        return ["mamba"] * layers
    if reader.model_type == "falcon_h1":
        return ["hybrid"] * layers
    return _windows(reader)


def _windows(reader: _Reader) -> Sequence[str]:
    """The layers that have a sliding window, in configs that do not name the type of each layer."""
    layers = reader.layers
    if reader.find("attention_chunk_size"):  # Llama 4
        step = reader.find("no_rope_layer_interval") or 4
        return _with(layers, range(step - 1, layers, step), "chunked_attention")
    if not reader.find("sliding_window") or reader.config.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    pattern = reader.config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:
        return [
            "sliding_attention" if pattern[i % len(pattern)] == "L" else "full_attention"
            for i in range(layers)
        ]
    usual = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4}
    cycle = reader.find("sliding_window_pattern") or usual.get(reader.model_type)
    if cycle:
        return _with(layers, range(cycle - 1, layers, cycle), "sliding_attention")
    first = reader.find("max_window_layers")
    if reader.model_type.startswith("qwen") and not reader.config.get("use_sliding_window"):
        return [
            "full_attention"
        ] * layers  # Qwen's configs have a window that is off unless they say otherwise
    return ["full_attention"] * min(first or 0, layers) + ["sliding_attention"] * max(
        layers - (first or 0), 0
    )


def _with(layers: int, full: Iterable[int], other: str) -> Sequence[str]:
    wanted = set(full)
    return ["full_attention" if i in wanted else other for i in range(layers)]
