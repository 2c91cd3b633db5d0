"""Run a checkpoint's model one layer at a time, so that memory holds one of its layers and never the whole.

Every forward is transformers' own. It begins anew for each layer: the layers before that one stand aside and hand on
what the last of them computed, and the forward ends where the layer is called, with the masks, positions and whatever
else it is called with known. What else earlier layers gave is not handed on but NaN, so that a model whose layers need
more of one another than hidden states is found out.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from shardprep_runtime.errors import FormatError, InputError, UnsupportedError, quote
from shardprep_runtime.format import dtypes

from ..index import Index, Tensor
from ..layout.quantization import Scheme
from ..model import skeleton
from ..model.describe import scheme_of
from ..source import open_source, read_checkpoint
from ..source.bytes import Sources, open_reader
from .packing import FIELDS, PACKED, dequantize

if TYPE_CHECKING:
    import torch
    from torch import nn

CHUNK: Final = 4 * 2**20
"""Bytes of a tensor that are read at a time."""

NEEDED: Final = {
    "gptq": ("qzeros", "scales"),
    "awq": ("qzeros", "scales"),
    "compressed-tensors": ("weight_scale",),
}
"""Method -> the fields that are always beside the packed numbers."""

PROMPT: Final = (2, 12)
"""Texts x tokens on which a small model is walked, to see that its kind can be."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a model's forward calls one of its layers with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def equals(self, other: Call) -> bool:
        """Whether every tensor is the same, value for value."""
        import torch

        own, others = _tensors((self.args, self.kwargs)), _tensors((other.args, other.kwargs))
        return len(own) == len(others) and all(map(torch.equal, own, others))


class Walk:
    """A checkpoint's model in float32 of which one layer at a time is in memory. Use as a context manager.

    Args:
        index: Any checkpoint, quantized by gptq, awq or pack-quantized, or not; its own values, upcast.
        vocabulary: The distinct ids of the tokens that it will be given: the rows of the embedding that are kept.

    Raises:
        UnsupportedError: For a model or quantization that cannot be walked.
        FormatError: Where the checkpoint's tensors are not those of its config; both from headers alone.
    """

    def __init__(self, index: Index, vocabulary: Iterable[int], *, device: str = "cpu") -> None:
        import torch

        if not index.config:
            raise InputError(
                f"{index.folder.where()}: no config.json, which says what architecture the tensors belong to"
            )
        self.where = index.folder.where()
        self.scheme = _scheme(index)
        self.device = torch.device(device)
        self.model = skeleton.bare(index.config)
        self.config: Any = self.model.config.get_text_config(decoder=True)
        self.kind = quote(self.model.config.model_type)
        self.vocab_size = len(_weight(self.model.get_input_embeddings()))
        """Tokens that the embedding knows."""
        self.vocabulary = sorted(set(vocabulary))
        self._check_vocabulary()
        self._index = index
        self._sources = Sources(index)
        path = _layers_path(self.model, self.kind)
        self._layers: list[nn.Module] = list(self.model.get_submodule(path).children())
        self._paths = [f"{path}.{number}." for number in range(len(self._layers))]
        self._keys = _Keys(index, self.scheme, self.model, self.where)
        self._keys.check()
        for buffer_of in self.model.modules():
            for name, buffer in buffer_of._buffers.items():
                if buffer is not None:
                    buffer_of._buffers[name] = buffer.to(self.device)
        self._next = 0
        """The layer that the forward has to call next."""
        self._stop = 0
        """The layer at which the forward ends."""
        self._given: torch.Tensor | None = None
        """What the layer before that one gave."""
        self._returns: dict[int, Any] = {}
        """Of each layer that ran what it returns, with a mark where its hidden states are."""
        self._options: dict[str, Any] = {}
        if hasattr(self.config, "use_cache"):
            self._options["use_cache"] = False
        self._can_choose = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        for number, layer in enumerate(self._layers):
            layer.forward = functools.partial(self._stand_in, number)

    def __enter__(self) -> Walk:
        try:
            self._load_ends()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:  # a layer that knows this walk keeps the model alive
            layer.__dict__.pop("forward", None)
        self._sources.__exit__(kind, error, trace)

    @property
    def layers(self) -> int:
        return len(self._layers)

    def load(self, layer: int) -> None:
        """Bring the tensors of a layer into memory."""
        self._load(self._keys.under(self._paths[layer]))

    def free(self, layer: int) -> None:
        """Let go of the tensors of a layer."""
        for module in self._layers[layer].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _emptied(parameter)

    def call(self, layer: int, ids: torch.Tensor, given: torch.Tensor | None) -> Call:
        """What the model's own forward of `ids` (texts x tokens) calls a layer with.

        Args:
            given: What the layer before it gave; None for the first layer.
        """
        try:
            self._forward(ids, layer, given)
        except _Reached as reached:
            call = reached.call
        else:
            raise UnsupportedError(f"{self.kind}: its forward does not call layer {layer}; {_REFUSED}")
        for tensor in _tensors((call.args, call.kwargs)):
            if tensor.is_meta or (tensor.is_floating_point() and bool(tensor.isnan().any())):
                raise UnsupportedError(
                    f"{self.kind}: layer {layer} needs more than the hidden states of the layer before it; {_REFUSED}"
                )
        return call

    def run(self, layer: int, call: Call) -> torch.Tensor:
        """The hidden states that a loaded layer gives. The call may be one of another walk of the same kind of model."""
        import torch

        module = self._layers[layer]
        before = _contents((call.args, call.kwargs))
        stand_in = module.__dict__.pop("forward")
        try:
            with torch.no_grad():
                output = module(*call.args, **call.kwargs)
        finally:
            module.forward = stand_in
        if _contents((call.args, call.kwargs)) != before:
            raise UnsupportedError(
                f"{self.kind}: layer {layer} changes what it is called with, for later ones to see; {_REFUSED}"
            )
        hidden = next(iter(_tensors(output)), None)
        if hidden is None or not hidden.is_floating_point() or hidden.is_meta:
            raise UnsupportedError(f"{self.kind}: layer {layer} gives no hidden states; {_REFUSED}")
        self._returns[layer] = _template(output, hidden)
        return hidden

    def load_head(self) -> None:
        """Bring the head into memory, once the layers have run. Raises SourceError where a file changed meanwhile."""
        self._load(self._head)
        self._sources.check_unchanged()

    def logits(self, ids: torch.Tensor, given: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The model's logits at positions [start, stop), from what its last layer gave: texts x positions x vocabulary."""
        import torch

        options = (
            {"logits_to_keep": torch.arange(start, stop, device=self.device)} if self._can_choose else {}
        )
        found: torch.Tensor = self._forward(ids, self.layers, given, **options).logits
        return found if self._can_choose else found[:, start:stop]

    # ---------------------------------------------------------------------------------------------- the forward

    def _forward(self, ids: torch.Tensor, stop: int, given: torch.Tensor | None, **options: Any) -> Any:
        """The model's forward, its layers standing aside; raises _Reached where it calls layer `stop`."""
        import torch

        self._next, self._stop, self._given = 0, stop, given
        try:
            with torch.no_grad():
                return self.model(ids.to(self.device), **self._options, **options)
        finally:
            self._given = None

    def _stand_in(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Be a layer for the forward: hand on hidden states, or end it."""
        import torch

        if layer != self._next:
            raise UnsupportedError(
                f"{self.kind}: layer {layer} runs where layer {self._next} was expected; {_REFUSED}"
            )
        self._next += 1
        if layer == self._stop:
            raise _Reached(Call(args, kwargs))
        given = self._given
        assert given is not None, "only a forward that ends at the first layer is given no hidden states"
        if layer != self._stop - 1:
            given = torch.full((), float("nan"), device=given.device).expand(given.shape)
        return _filled(self._returns[layer], given)

    # ------------------------------------------------------------------------------------------------- tensors

    def _check_vocabulary(self) -> None:
        for token in self.vocabulary[:1] + self.vocabulary[-1:]:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"token {token}: {self.where} knows {self.vocab_size}; is the text of another tokenizer?"
                )

    def _load_ends(self) -> None:
        """Load what lies outside of the layers: of the embedding the rows that are needed, the head not yet."""
        outside = self._keys.outside(self._paths)
        paths = {id(module): path for path, module in self.model.named_modules()}
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = self._keys.under(f"{paths[id(head)]}.") if head is not None else []
        key = f"{paths[id(embedding)]}.weight"
        plain = self._keys.plain(key)
        if plain is not None:
            self._embed(embedding, plain)
        self._load([each for each in outside if each not in self._head and (plain is None or each != key)])

    def _embed(self, embedding: Any, stored: Tensor) -> None:
        """Give the embedding the rows of our tokens alone, under numbers of their own."""
        import torch

        numbers = torch.full((stored.shape[0],), -1)
        numbers[self.vocabulary] = torch.arange(len(self.vocabulary))
        numbers = numbers.to(self.device)
        weight = _read_rows(self._sources, stored, self.vocabulary).to(self.device, torch.float32)
        embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
        embedding.padding_idx = None  # a row of the whole; it matters to gradients alone

        def renumber(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return numbers[args[0]], *args[1:]

        embedding.register_forward_pre_hook(renumber)

    def _load(self, keys: Sequence[str]) -> None:
        """Bring parameters into memory; those that the checkpoint has under the name of a tied one, from there."""
        partners = {key: partner for key in keys if (partner := self._keys.partner(key)) is not None}
        kept = {key: _get(self.model, key) for key in set(partners.values()) - set(keys)}
        for key, parameter in kept.items():  # the embedding has few of its rows
            _set(self.model, key, _emptied(parameter, self._keys.state[key]))
        names = self._keys.names([*keys, *partners.values()])
        self._keys.convert({name: self._read(name) for name in names}, self.device)
        for key, partner in partners.items():
            _set(self.model, key, _get(self.model, partner))
        for key, parameter in kept.items():
            _set(self.model, key, parameter)

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the model as it was before it was quantized."""
        fields = self._keys.fields[name]
        if "" in fields:
            return _read_tensor(self._sources, fields[""])
        assert self.scheme is not None
        found = dequantize(
            {field: _read_tensor(self._sources, each) for field, each in fields.items()}, self.scheme
        )
        return found.t().contiguous() if name in self._keys.flipped else found


_REFUSED: Final = "such a model cannot be measured one layer at a time"


class _Reached(Exception):  # noqa: N818 - no error: the forward came to the layer that was asked for
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


@functools.lru_cache(maxsize=8)
def _check_kind(config: str) -> None:
    import torch

    shrunk = skeleton.shrink(json.loads(config))
    kind = quote(shrunk["model_type"])
    try:
        small = skeleton.build(shrunk)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{kind}: a small one, to try whether its layers can be run one at a time, cannot be had: {error}"
        ) from None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, small.config.get_text_config().vocab_size, PROMPT, generator=generator)
    options = {"use_cache": False} if hasattr(small.config.get_text_config(), "use_cache") else {}
    with tempfile.TemporaryDirectory(prefix="shardprep-") as folder:
        try:
            with skeleton.quiet(), torch.no_grad():
                small.save_pretrained(folder)
                expected = small(ids, **options).logits
                last = (ids[:, -1:] + 1) % 3
                changed = small(torch.cat([ids[:, :-1], last], 1), **options).logits
        except Exception as error:  # noqa: BLE001 - whatever a model of theirs may raise
            raise UnsupportedError(
                f"{kind}: transformers cannot run a small one: {type(error).__name__}: {_line(error)}"
            ) from None
        with open_source(Path(folder)) as source:
            try:
                found = walk(read_checkpoint(source), ids)
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - as above: what layers lack shows in many ways
                raise UnsupportedError(
                    f"{kind}: {type(error).__name__}: {_line(error)}; {_REFUSED}"
                ) from None
    if not torch.equal(found, expected):
        raise UnsupportedError(
            f"{kind}: one layer at a time, a small one computes other logits than as a whole; {_REFUSED}"
        )
    if not torch.allclose(changed[:, :-1], expected[:, :-1], rtol=1e-3, atol=1e-3):
        raise UnsupportedError(
            f"{kind}: its logits depend on later tokens, so that it predicts none; quality is measured of causal "
            "language models"
        )


def check_kind(config: Mapping[str, Any]) -> None:
    """Walk a small random model of this config. Raises UnsupportedError where that is not what the whole computes."""
    import torch

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, and small models are faster
    try:
        _check_kind(json.dumps(plain, sort_keys=True))
    finally:
        torch.set_num_threads(threads)


def walk(index: Index, ids: torch.Tensor, *, device: str = "cpu") -> torch.Tensor:
    """The logits of `ids` (texts x tokens), computed one layer at a time."""
    with Walk(index, ids.flatten().tolist(), device=device) as model:
        hidden = None
        for layer in range(model.layers):
            model.load(layer)
            hidden = model.run(layer, model.call(layer, ids, hidden))
            model.free(layer)
        assert hidden is not None
        model.load_head()
        return model.logits(ids, hidden, 0, ids.shape[1])


# ------------------------------------------------------------------------------------------------- names of tensors


class _Keys:
    """Which tensors of a checkpoint a model's parameters are made of: by transformers' own rules, from headers."""

    def __init__(self, index: Index, scheme: Scheme | None, model: Any, where: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self.where = where
        self.scheme = scheme
        self.mapping: Any = get_model_conversion_mapping(model)
        self.state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        self.fields = _fields(index, scheme)
        """Name of a tensor as it was before it was quantized -> its fields; of one that was not, itself under ``."""
        self.of: dict[str, list[str]] = {}
        """Parameter -> the names that it is made of; of several that are made together the first has them."""
        self.flipped: set[str] = set()
        """Quantized weights that the model has in x out."""
        self._place(model.state_dict())

    def _place(self, state: dict[str, Any]) -> None:
        from transformers import core_model_loading as loading

        renamings = [each for each in self.mapping if isinstance(each, loading.WeightRenaming)]
        converters = [each for each in self.mapping if isinstance(each, loading.WeightConverter)]
        prefix = self.model.base_model_prefix
        self.converted: set[str] = set()
        for name in self.fields:
            key, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
            if key not in state and name in state:
                key, pattern = loading.rename_source_key(
                    name, [], [], base_model_prefix=prefix, meta_state_dict=state
                )
            if key not in state:
                continue  # a layer that predicts further tokens, or what older versions stored
            self.of.setdefault(key, []).append(name)
            if pattern is not None:
                self.converted.add(key)
            elif "" not in self.fields[name] and _is_flipped(self.model, key):
                self.flipped.add(name)

    def under(self, path: str) -> list[str]:
        return [key for key in self.state if key.startswith(path)]

    def outside(self, paths: Iterable[str]) -> list[str]:
        return [key for key in self.state if not key.startswith(tuple(paths))]

    def names(self, keys: Iterable[str]) -> list[str]:
        """The tensors of the checkpoint that parameters are made of, each once."""
        return list(dict.fromkeys(name for key in keys for name in self.of.get(key, ())))

    def partner(self, key: str) -> str | None:
        """The parameter that one is tied to, where only that one is in the checkpoint."""
        tied = self.model.all_tied_weights_keys
        if key in self.of or (key not in tied and key not in tied.values()):
            return None
        first = tied.get(key, key)
        group = [first, *(target for target, source in tied.items() if source == first)]
        return next((each for each in group if each in self.of), None)

    def plain(self, key: str) -> Tensor | None:
        """The tensor that a parameter is, where it is one as it stands in the checkpoint."""
        key = self.partner(key) or key
        names = self.of.get(key, ())
        if len(names) != 1 or key in self.converted:
            return None
        return self.fields[names[0]].get("")

    def check(self) -> None:
        """Raises FormatError where the checkpoint's tensors are not those that the model is made of."""
        import torch

        buffers = [dict(module._buffers) for module in self.model.modules()]
        meta = torch.device("meta")
        tensors = {
            name: torch.empty(self._shape(name), dtype=torch.float32, device=meta)
            for name in self.names(self.of)
        }
        info = self.convert(tensors, meta)
        for module, own in zip(self.model.modules(), buffers, strict=True):
            module._buffers.update(own)
        named = {name for name, _ in self.model.named_buffers()}
        self.model._adjust_missing_and_unexpected_keys(info)
        missing = [key for key in info.missing_keys if self.partner(key) is None and key not in named]
        if missing:
            raise FormatError(
                f"{self.where}: no tensor for {quote(min(missing))}{_others(len(missing))}, which a "
                f"{quote(self.model.config.model_type)} of this config.json has; is the checkpoint whole?"
            )

    def convert(self, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
        """Make parameters of the checkpoint's tensors, as from_pretrained does. Raises FormatError where they do not fit."""
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            device_map={"": device}, dtype=torch.float32, weight_mapping=self.mapping
        )
        with skeleton.quiet(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        for key, shape, expected in sorted(info.mismatched_keys):
            raise FormatError(
                f"{self.where}: {quote(key)} has shape {list(shape)}, expected {list(expected)}: config.json is "
                "not this checkpoint's"
            )
        for key, problem in info.conversion_errors.items():
            raise FormatError(f"{self.where}: {quote(key)} cannot be made of its tensors: {_line(problem)}")
        return info

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor before it was quantized."""
        fields = self.fields[name]
        if "" in fields:
            return fields[""].shape
        assert self.scheme is not None
        shape = _unpacked_shape(fields, self.scheme)
        return shape[::-1] if name in self.flipped else shape


def _fields(index: Index, scheme: Scheme | None) -> dict[str, dict[str, Tensor]]:
    tensors = {**index.tensors, **{alias: index.tensors[name] for alias, name in index.aliases.items()}}
    if scheme is None:
        return {name: {"": tensor} for name, tensor in tensors.items()}
    packed = PACKED[scheme.method]
    stems = {name.removesuffix(f".{packed}") for name in tensors if name.endswith(f".{packed}")}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, field = name.rpartition(".")
        if stem in stems and field in FIELDS:
            found.setdefault(f"{stem}.weight", {})[field] = tensor
        else:
            found[name] = {"": tensor}
    for stem in stems:
        missing = [field for field in NEEDED[scheme.method] if field not in found[f"{stem}.weight"]]
        if missing:
            raise FormatError(
                f"{index.folder.where()}: {quote(stem)} has no {missing[0]}, without which its packed weight "
                f"({scheme.method}) stands for nothing; is the checkpoint whole?"
            )
    return found


def _unpacked_shape(fields: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, ...]:
    """Out x in of the weight that packed fields stand for."""
    shape = fields[PACKED[scheme.method]].shape
    if len(shape) != 2:
        raise FormatError(
            f"{quote(fields[PACKED[scheme.method]].name)}: a packed weight of shape {list(shape)}; expected 2 dims"
        )
    words = 32 // scheme.bits
    match scheme.method:
        case "gptq":  # in / words x out
            return shape[1], shape[0] * words
        case "awq":  # in x out / words
            return shape[1] * words, shape[0]
    columns = shape[1] * words
    if scheme.group is not None:  # the last word of a row may be filled up
        columns = min(columns, fields["weight_scale"].shape[-1] * scheme.group)
    return shape[0], columns


def _scheme(index: Index) -> Scheme | None:
    """How a checkpoint is quantized; None where it is not. Raises UnsupportedError for what cannot be dequantized."""
    scheme = scheme_of(index)
    if scheme is not None and (
        scheme.method not in PACKED
        or (scheme.method == "compressed-tensors" and scheme.format != "pack-quantized")
    ):
        raise UnsupportedError(
            f"{index.folder.where()}: quantized by {quote(scheme.method)} ({quote(scheme.format)}); quality is measured "
            "of gptq, awq and compressed-tensors' pack-quantized, and of what is not quantized"
        )
    return scheme


# --------------------------------------------------------------------------------------------- a model's modules


def _layers_path(model: Any, kind: str) -> str:
    """Where in the model the list of its layers is."""
    from torch import nn

    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found: dict[str, int] = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not found:
        raise UnsupportedError(f"{kind}: transformers builds it of no one list of layers; {_REFUSED}")
    return max(found, key=lambda path: found[path])  # experts that are as many lie within


def _is_flipped(model: Any, key: str) -> bool:
    """Whether a weight is in x out."""
    return type(model.get_submodule(key.rpartition(".")[0])).__name__ == "Conv1D"


def _weight(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.weight
    return found


def _get(model: Any, key: str) -> nn.Parameter:
    path, _, name = key.rpartition(".")
    found: nn.Parameter = getattr(model.get_submodule(path), name)
    return found


def _set(model: Any, key: str, parameter: nn.Parameter) -> None:
    path, _, name = key.rpartition(".")
    setattr(model.get_submodule(path), name, parameter)


def _emptied(parameter: nn.Parameter, shape: Sequence[int] | None = None) -> nn.Parameter:
    import torch

    empty = torch.empty(shape or parameter.shape, dtype=parameter.dtype, device="meta")
    return torch.nn.Parameter(empty, requires_grad=False)


# ------------------------------------------------------------------------------------- what layers take and give


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in arguments or in what a module returns, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [found for each in value for found in _tensors(each)] if isinstance(value, tuple | list) else []


def _contents(value: Any) -> Any:
    """What is in arguments: differs once a layer has put something into them, or changed it."""
    import torch

    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, Mapping):
        return {key: _contents(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_contents(each) for each in value]
    return id(value), _contents(vars(value)) if type(value).__module__ == "transformers.cache_utils" else None


class _Hidden:
    """The mark where a layer returns its hidden states."""


def _template(output: Any, hidden: torch.Tensor) -> Any:
    """What a layer returns, with a mark for its hidden states, and values that spoil what is made of them for others."""
    import torch

    if output is hidden:
        return _Hidden
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            return torch.tensor(float("nan"), dtype=output.dtype, device=output.device)
        return torch.empty((), dtype=output.dtype, device="meta")
    if isinstance(output, tuple | list):
        return type(output)(_template(each, hidden) for each in output)
    return output


def _filled(template: Any, hidden: torch.Tensor) -> Any:
    if template is _Hidden:
        return hidden
    if isinstance(template, tuple | list):
        return type(template)(_filled(each, hidden) for each in template)
    return template


# ------------------------------------------------------------------------------------------------- reading


def _read_tensor(sources: Sources, tensor: Tensor) -> torch.Tensor:
    """A tensor of a checkpoint, whole."""
    import torch

    memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
    into = memoryview(memory.numpy())  # type: ignore[arg-type]
    for start, chunk in _chunks(sources, tensor, CHUNK):
        into[start : start + len(chunk)] = chunk
    return memory.view(_dtype(tensor)).view(tensor.shape)


def _read_rows(sources: Sources, tensor: Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor, in ascending order. All of it is read, so that its checksum is checked."""
    import torch

    row = tensor.nbytes // max(tensor.shape[0], 1)
    memory = torch.empty(len(rows), row, dtype=torch.uint8)
    wanted = iter(enumerate(rows))
    place, number = next(wanted, (0, None))
    for start, chunk in _chunks(sources, tensor, max(CHUNK // max(row, 1), 1) * row):
        piece = torch.frombuffer(chunk, dtype=torch.uint8).view(-1, row)
        first = start // row
        while number is not None and number < first + len(piece):
            memory[place] = piece[number - first]
            place, number = next(wanted, (0, None))
    return memory.view(_dtype(tensor)).view(len(rows), *tensor.shape[1:])


def _chunks(sources: Sources, tensor: Tensor, size: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a tensor in order, each chunk with the byte at which it begins."""
    reader = open_reader(sources, tensor, tensor.dtype)
    for start in range(0, tensor.nbytes, size or 1):
        yield start, reader.read(start, min(start + size, tensor.nbytes))
    reader.finish()


def _dtype(tensor: Tensor) -> torch.dtype:
    import torch

    name = dtypes.TORCH.get(tensor.dtype)
    if name is None or not hasattr(torch, name) or dtypes.BITS[tensor.dtype] < 8:
        raise UnsupportedError(f"{quote(tensor.name)}: torch has no dtype {tensor.dtype}; it cannot be run")
    found: torch.dtype = getattr(torch, name)
    return found


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def _others(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
