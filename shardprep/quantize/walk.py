"""Run a checkpoint's model one layer at a time, so that memory holds one of its layers and never the whole.

It is the relay of `shardprep_runtime.stage` with stages of one layer: all others stand aside in transformers' own forward.
What a stage's relay needs of the model, its trial proves: that no layer needs more of those before it than hidden states.
Imports torch and transformers: nothing imports this module before a model is measured.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from shardprep_runtime.errors import FormatError, InputError, LayoutError, UnsupportedError, quote
from shardprep_runtime.stage.model import find_layers
from shardprep_runtime.stage.relay import Built, Relay, StandIn, forward
from shardprep_runtime.stage.trial import try_cuts
from shardprep_runtime.stage.weights import Names, line_of, load_tensors, set_module

from ..index import Index
from ..model import skeleton
from ..source import open_source, read_checkpoint
from .unquantized import Unquantized

PROMPT: Final = (2, 12)
"""Texts x tokens on which a small model is walked, to see that its kind can be."""

_REFUSED: Final = "such a model cannot be measured one layer at a time"


class Walk:
    """A checkpoint's model in float32 of which one layer at a time is in memory. Use as a context manager.

    Args:
        index: Any checkpoint, quantized by gptq, awq or pack-quantized, or not; its own values, upcast.
        vocabulary: The distinct ids of the tokens that it will be given: the rows of the embedding that are kept.
        device: Where it computes, as torch names it.

    Raises:
        UnsupportedError: For a model or quantization that cannot be walked.
        FormatError: Where the checkpoint's tensors are not those of its config; both from headers alone.
    """

    def __init__(self, index: Index, vocabulary: Iterable[int], *, device: str = "cpu") -> None:
        if not index.config:
            raise InputError(
                f"{index.folder.where()}: no config.json, which says what architecture the tensors belong to"
            )
        self.where = index.folder.where()
        self.device = torch.device(device)
        self._tensors = Unquantized(index)
        self.model = skeleton.bare(index.config)
        self.config: Any = self.model.config.get_text_config(decoder=True)
        self.kind = quote(self.model.config.model_type)
        self._embedding: Any = self.model.get_input_embeddings()
        self.vocab_size = self.model.get_input_embeddings().get_parameter("weight").size(0)
        """Tokens that the embedding knows."""
        self.vocabulary = sorted(set(vocabulary))
        self._check_vocabulary()
        sizes = {
            path: sum(each.numel() for each in self.model.get_submodule(path).parameters())
            for path in find_layers(self.model, getattr(self.config, "num_hidden_layers", 0))
        }
        self._path = max(sizes, key=lambda path: sizes[path])  # experts that are as many lie within
        self._keys = list(self.model.state_dict())
        self._tied: dict[str, str] = self.model.all_tied_weights_keys
        self.model.all_tied_weights_keys = {}  # of the embedding we have few rows, of the head all
        self._place_tensors()
        self._check_whole()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        self._layers: list[nn.Module] = list(self.model.get_submodule(self._path).children())
        self._relay = Relay(0, 0, self.layers)
        for number, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._relay.enter, with_kwargs=True)
            set_module(self.model, f"{self._path}.{number}", StandIn(layer, number, self._relay.stand_in))
        self._layers[-1].register_forward_hook(self._relay.leave)
        parameters = frozenset(inspect.signature(self.model.forward).parameters)
        self._built = Built(
            self.model, self._layers, self._relay, torch.float32, self.device, 0, None, parameters
        )

    def __enter__(self) -> Walk:
        try:
            self._load_ends()
            try_cuts(self._built, self._path, self._layers, range(1, self.layers), embeds=True)
        except UnsupportedError as error:
            self._tensors.close()
            raise UnsupportedError(f"{error}; {_REFUSED}") from None
        except BaseException:
            self._tensors.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return len(self._layers)

    def load(self, layer: int) -> None:
        """Bring the tensors of a layer into memory."""
        set_module(self.model, f"{self._path}.{layer}", self._layers[layer])
        self._load(self._under(f"{self._path}.{layer}."))

    def free(self, layer: int) -> None:
        """Let go of the tensors of a layer."""
        own = self._layers[layer]
        set_module(self.model, f"{self._path}.{layer}", StandIn(own, layer, self._relay.stand_in))
        for module in own.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model's first layer is given for `ids` (texts x tokens): texts x tokens x hidden size."""
        return self._forward((0, 0), ids, None)

    def run(self, layer: int, ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The hidden states that a loaded layer hands on.

        Args:
            layer: Its number.
            ids: The tokens, texts x tokens, on which masks, positions and the like depend.
            given: What the layer before handed on, in this or another model of the same kind.
        """
        return self._forward((layer, layer + 1), ids, given.clone())  # a layer may change it in place

    def load_head(self) -> None:
        """Bring the head into memory, once the layers have run. Raises SourceError where a file changed meanwhile."""
        self._load(self._head)
        self._tensors.check_unchanged()

    def logits(self, ids: torch.Tensor, given: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The logits at positions [start, stop): texts x positions x vocabulary.

        Args:
            ids: The tokens, texts x tokens.
            given: What the last layer handed on.
            start: The first position.
            stop: The end of the positions, exclusive.
        """
        keep = torch.arange(start, stop, device=self.device)
        return self._forward((self.layers, self.layers), ids, given, keep)

    def _forward(
        self,
        own: tuple[int, int],
        ids: torch.Tensor,
        given: torch.Tensor | None,
        keep: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """The model's forward as the stage of the layers [start, stop) runs it."""
        self._relay.start, self._relay.stop = own
        with torch.no_grad():
            return forward(self._built, ids.to(self.device), given, keep=keep, cache=None)

    # ------------------------------------------------------------------------------------------------- tensors

    def _check_vocabulary(self) -> None:
        for token in self.vocabulary[:1] + self.vocabulary[-1:]:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"token {token}: {self.where} knows {self.vocab_size}; is the text of another tokenizer?"
                )

    def _place_tensors(self) -> None:
        """Find out which parameters the checkpoint's tensors go into, by transformers' own rules."""
        names = Names(self.model, None)
        self._made_of: dict[str, list[str]] = {}
        """Parameter -> the names of the tensors that it is made of."""
        self._flipped: set[str] = set()
        """Quantized weights that the model has in x out."""
        for name in self._tensors.names:
            key, pattern = names.key(name)
            if key not in self._keys:
                continue  # a layer that predicts further tokens, or what older versions stored
            for each in names.keys(name):
                self._made_of.setdefault(each, []).append(name)
            module = self.model.get_submodule(key.rpartition(".")[0])
            if pattern is None and self._tensors.stored(name) is None and type(module).__name__ == "Conv1D":
                self._flipped.add(name)

    def _check_whole(self) -> None:
        """Raises FormatError where the checkpoint's tensors are not those that the model is made of."""
        buffers = [dict(module._buffers) for module in self.model.modules()]
        computed = {name for name, _ in self.model.named_buffers()}
        shapes = {
            name: self._tensors.shape(name)[:: -1 if name in self._flipped else 1]
            for name in self._names(self._made_of)
        }
        meta = torch.device("meta")
        try:
            with skeleton.quiet():
                load_tensors(
                    self.model,
                    {name: torch.empty(shape, device=meta) for name, shape in shapes.items()},
                    lambda key: key in computed or self._partner(key) is not None,
                    dtype=torch.float32,
                    device=meta,
                )
        except LayoutError as error:
            raise FormatError(f"{self.where}: {error}") from None
        for module, own in zip(self.model.modules(), buffers, strict=True):
            module._buffers.update(own)

    def _load_ends(self) -> None:
        """Load what lies outside of the layers: of the embedding the rows that are needed, the head not yet."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = self._under(f"{paths[id(head)]}.") if head is not None else []
        layers = self._under(f"{self._path}.")
        outside = [key for key in self._keys if key not in {*self._head, *layers}]
        key = f"{paths[id(self._embedding)]}.weight"
        sources = self._made_of.get(self._partner(key) or key, [])
        if len(sources) == 1 and self._tensors.stored(sources[0]) is not None:
            self._embed_rows(sources[0])
            outside.remove(key)
        self._load(outside)

    def _embed_rows(self, name: str) -> None:
        """Give the embedding the rows of our tokens alone, under numbers of their own."""
        numbers = torch.zeros(self.vocab_size, dtype=torch.int64)  # a trial's tokens may be any
        numbers[self.vocabulary] = torch.arange(len(self.vocabulary))
        numbers = numbers.to(self.device)
        weight = self._tensors.read_rows(name, self.vocabulary).to(self.device, torch.float32)
        self._embedding.weight = nn.Parameter(weight, requires_grad=False)
        self._embedding.padding_idx = None  # a row of the whole; it matters to gradients alone

        def renumber(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return numbers[args[0]], *args[1:]

        self._embedding.register_forward_pre_hook(renumber)

    def _load(self, keys: Sequence[str]) -> None:
        """Bring parameters into memory; those that the checkpoint has under the name of a tied one, from there."""
        with skeleton.quiet():
            load_tensors(
                self.model,
                {name: self._read(name) for name in self._names(keys)},
                lambda _: True,  # that none is missing was checked
                dtype=torch.float32,
                device=self.device,
            )
        for key in keys:
            partner = self._partner(key)
            if partner is not None:
                (name,) = self._made_of[partner]
                path, _, parameter = key.rpartition(".")
                weight = self._read(name).to(self.device, torch.float32)
                setattr(self.model.get_submodule(path), parameter, nn.Parameter(weight, requires_grad=False))

    def _read(self, name: str) -> torch.Tensor:
        found = self._tensors.read(name)
        return found.t().contiguous() if name in self._flipped else found

    def _under(self, path: str) -> list[str]:
        return [key for key in self._keys if key.startswith(path)]

    def _names(self, keys: Iterable[str]) -> list[str]:
        """The tensors of the checkpoint that parameters are made of, each once."""
        return list(dict.fromkeys(name for key in keys for name in self._made_of.get(key, ())))

    def _partner(self, key: str) -> str | None:
        """The parameter that one is tied to, where only that one is in the checkpoint, as one tensor."""
        if key in self._made_of:
            return None
        first = self._tied.get(key, key)
        group = [first, *(target for target, source in self._tied.items() if source == first)]
        return next((each for each in group if len(self._made_of.get(each, ())) == 1), None)


def walk(index: Index, ids: torch.Tensor, *, device: str = "cpu") -> torch.Tensor:
    """The logits of a text, computed one layer at a time: texts x tokens x vocabulary.

    Args:
        index: As `Walk` takes it.
        ids: The tokens, texts x tokens.
        device: As `Walk` takes it.
    """
    with Walk(index, ids.flatten().tolist(), device=device) as model:
        hidden = model.embed(ids)
        for layer in range(model.layers):
            model.load(layer)
            hidden = model.run(layer, ids, hidden)
            model.free(layer)
        model.load_head()
        return model.logits(ids, hidden, 0, ids.shape[1])


def check_kind(config: Mapping[str, Any]) -> None:
    """Walk a small random model of this config. Raises UnsupportedError where that is not what the whole computes."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, and small models are faster
    try:
        _check_kind(json.dumps(plain, sort_keys=True))
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=8)
def _check_kind(config: str) -> None:
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
                f"{kind}: transformers cannot run a small one: {type(error).__name__}: {line_of(error)}"
            ) from None
        with open_source(Path(folder)) as source:
            try:
                found = walk(read_checkpoint(source), ids)
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - as above: what layers lack shows in many ways
                raise UnsupportedError(
                    f"{kind}: {type(error).__name__}: {line_of(error)}; {_REFUSED}"
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
