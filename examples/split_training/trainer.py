"""Train a split model: each stage in a process of its own, gradients by torch's distributed autograd over RPC.

    with SplitTrainer("llama-70b-tp8", stages=2, learning_rate=1e-4, freeze=("first", *range(16))) as trainer:
        for ids in batches:
            print(trainer.step(ids))
        saved = trainer.save("llama-70b-tuned")

The stages are processes of this host and meet on its loopback interface alone: RPC runs the code of any peer that
reaches it, whoever else has an account here included. The caller's process takes no part in RPC; it tells the stages
what to do through pipes, with which they end. README.md beside it says what this is for and what it cannot do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, get_args

from shardprep_runtime import errors
from shardprep_runtime.errors import (
    InputError,
    ProblemError,
    UnsupportedError,
    WorkerError,
    WorkerLostError,
    WriteError,
    quote,
)
from shardprep_runtime.format import manifest as manifests
from shardprep_runtime.format.grid import Stages
from shardprep_runtime.format.manifest import PLACEMENTS, Layer, Manifest, lines_of
from shardprep_runtime.format.read_manifest import read_named
from shardprep_runtime.format.view import Place, choose_stages
from shardprep_runtime.shard.filesystem import sync_folder
from shardprep_runtime.shard.revisions import DEFAULT_REVISION, read_revision
from shardprep_runtime.shard.shard import Shard, Verify
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.shard.side_files import write_small
from shardprep_runtime.stage.stage import Stage, stage_of
from shardprep_runtime.stores.open import is_uri, open_store
from shardprep_runtime.stores.store import Access

if TYPE_CHECKING:
    import torch

Optimizer = Literal["sgd", "adamw"]

TRAINED: Final = ("F32", "BF16", "F16")
"""What tensors that are trained may be stored as: they become float32, and are saved as they were stored."""

INDEX: Final = "model.safetensors.index.json"

LOOPBACK: Final = "lo"
"""The interface to which RPC is bound (and gloo, by which it meets)."""

FOLDER: Final = Path(__file__).resolve().parent
MODULE: Final = Path(__file__).stem
"""This file, from which the stages' processes start; by the name MODULE, each finds the functions that others call."""

END_SECONDS: Final = 5.0
"""After which a stage that was told to end is ended."""

LAST_WORDS: Final = 0.5
"""Seconds in which the end of a stage is noticed after another has complained of it."""

NOTHING_LEFT: Final = "freeze: nothing is left to be trained"
IDS: Final = "ids: expected sequences of the same length, of at least two token ids each"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was saved."""

    folder: Path
    files: tuple[str, ...]
    """Of weights, one for each stage."""
    nbytes: int
    """Of its tensors."""
    changed: tuple[str, ...]
    """Names of the tensors that are not what they were in the shard set."""
    split_options: tuple[str, ...]
    """What `shardprep split` must be told so that tensors that did not change end in parts that did not change. (What a
    manifest does not say, --allow-generic for a model without rules, is not among it.)"""


class SplitTrainer:
    """A model that is trained in stages. Close it, or use it as a context manager.

    What a stage refuses (ids, a loss that is no number, a folder that cannot be written) leaves it as it was. Any other
    failure, and the end of any stage, ends all of them with a WorkerError: what was learnt since the last `save` is lost.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        stages: int | Sequence[Sequence[int]],
        learning_rate: float,
        optimizer: Optimizer = "adamw",
        weight_decay: float = 0.0,
        freeze: Collection[Layer] = (),
        threads: int | None = None,
        timeout: float = 600.0,
        start_timeout: float = 3600.0,
        verify: Verify = "blocks",
        manifest_digest: str | None = None,
        revision: str = DEFAULT_REVISION,
        cache: str | os.PathLike[str] | None = "host",
        access: Access | None = None,
    ) -> None:
        """Start the stages of the shard set at `source`, a folder or a URI; return once all have their weights.

        Args:
            stages: How many (at least 2), or the layers [start, stop) of each.
            freeze: Layers that stay as they are, by number, and placements: "first" is the embedding, "last" the head
                and the norm before it, "ends" an embedding that is the head too, "every" what all stages hold.
            threads: Of each stage's process; None: as torch chooses.
            timeout: Seconds after which a stage that gives no answer counts as hung.
            start_timeout: The same while they fetch their weights.
            verify: As `load` has them.
            manifest_digest: As `load` has them.
            revision: As `load` has them.
            cache: As `load` has them.
            access: As `load` has them.

        Raises:
            InputError: For what cannot be trained, before any process is started where that can be known.
        """
        self._children: list[_Child] = []
        self._stack = ExitStack()
        self._timeout, self._has_begun = timeout, False
        _check_options(learning_rate, optimizer, weight_decay, timeout=timeout, start_timeout=start_timeout)
        self.manifest, self.manifest_digest = _manifest_of(source, revision, manifest_digest, access)
        """The manifest that was read, whatever the revision is moved to meanwhile, and its `sha256:...`."""
        self.stages = _chosen(self.manifest, stages)
        """Layers [start, stop) of each."""
        self._freeze = _frozen(self.manifest, freeze)
        self._broken: str | None = None
        try:
            scratch = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-train-"))
            self._scratch = Path(scratch)
            self._folder = self._stack.enter_context(
                open_set(source, revision=revision, digest=self.manifest_digest, access=access).side_files()
            )
            options = {
                "source": str(source),
                "folder": str(self._folder),
                "scratch": str(self._scratch),
                "meeting": f"file://{self._scratch / 'meeting'}",
                "stages": self.stages,
                "freeze": sorted(self._freeze, key=str),
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "threads": threads,
                "timeout": timeout,
                "verify": verify,
                "manifest_digest": self.manifest_digest,
                "revision": revision,
                "cache": os.fspath(cache) if cache is not None else None,
                "access": asdict(access) if access is not None else None,
            }
            for pp_rank, layers in enumerate(self.stages):
                log = self._scratch / f"stage-{pp_rank}.log"
                self._children.append(_Child(f"stage-{pp_rank}", layers, log))
                self._children[-1].tell({**options, "pp_rank": pp_rank}, start_timeout)
            self._answers(self._children, start_timeout)  # all have their weights
            self._ask(self._children, "meet")
            trained = self._ask(self._children[:1], "begin")[0]
            if not trained:
                raise InputError(NOTHING_LEFT)
            self._has_begun = True
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------ training
    def step(self, ids: torch.Tensor | Sequence[Sequence[int]]) -> float:
        """Learn from sequences of token ids; gives the loss (mean cross entropy of each next token) before the step.

        Raises:
            InputError: For ids that the model cannot take, and ProblemError, with the weights as they were, where the
                loss is no number.
        """
        return self._learn("step", ids)

    def evaluate(self, ids: torch.Tensor | Sequence[Sequence[int]]) -> float:
        """The loss, without learning."""
        return self._learn("evaluate", ids)

    def gradients(self, ids: torch.Tensor | Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """The gradient of the loss by each tensor that is trained, under the checkpoint's names, without learning."""
        from safetensors.torch import load_file

        self._learn("gradients", ids)
        found: dict[str, torch.Tensor] = {}
        for child in self._children:
            path = self._scratch / f"{child.name}.gradients"
            found.update(load_file(path))
            path.unlink()
        return dict(sorted(found.items()))

    def _learn(self, what: str, ids: torch.Tensor | Sequence[Sequence[int]]) -> float:
        # stage 0 leads: it calls the next, which calls the next; only hidden states go between them
        found: float = self._ask(self._children[:1], what, ids=_listed(ids))[0]
        return found

    # -------------------------------------------------------------------------------------------------------- saving
    def save(self, folder: str | os.PathLike[str]) -> Saved:
        """Write a checkpoint in the Hugging Face layout into `folder`, new or empty: one file of weights a stage.

        Tensors are stored in the dtypes that the shard set has, those that are frozen bit for bit. The index comes
        last: a folder that has one is complete. One that a failure left without is of no use.
        """
        folder = Path(folder).absolute()
        _make_new(folder)
        count = len(self._children)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        written = self._ask(self._children, "save", each=[{"path": str(folder / name)} for name in files])
        for side in self.manifest.side_files:
            write_small(folder / side.path, (self._folder / side.path).read_bytes())
        weight_map = {name: file for file, own in zip(files, written, strict=True) for name in own["names"]}
        nbytes = sum(own["nbytes"] for own in written)
        sync_folder(folder)
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_small(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        sync_folder(folder)
        pieces: dict[str, int] = {}
        for own in written:
            for path, number in own["pieces"].items():
                pieces[path] = pieces.get(path, 0) + number
        return Saved(
            folder=folder,
            files=tuple(files),
            nbytes=nbytes,
            changed=tuple(sorted(name for own in written for name in own["changed"])),
            split_options=split_options(self.manifest, pieces),
        )

    # ----------------------------------------------------------------------------------------------------- processes
    @property
    def pids(self) -> tuple[int, ...]:
        """Of the stages' processes."""
        return tuple(child.process.pid for child in self._children)

    def close(self) -> None:
        """End the stages. What was not saved is lost."""
        self._end(END_SECONDS)

    def _end(self, seconds: float) -> None:
        for child in self._children:
            child.let_go()
        deadline = time.monotonic() + seconds
        for child in self._children:
            child.end(deadline)
        self._children = []
        self._stack.close()
        self._broken = self._broken or "it was closed"

    def __enter__(self) -> SplitTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        children: Sequence[_Child],
        what: str,
        *,
        each: Sequence[Mapping[str, object]] | None = None,
        **given: object,
    ) -> list[Any]:
        """What these stages answer; others are watched meanwhile."""
        if self._broken is not None:
            raise WorkerError(f"the trainer cannot go on: {self._broken}; start another one")
        for i, child in enumerate(children):
            child.tell({"do": what, **given, **(each[i] if each is not None else {})}, self._timeout)
        return self._answers(children, self._timeout)

    def _answers(self, children: Sequence[_Child], timeout: float) -> list[Any]:
        """One answer of each of `children`; raises the first that is an error, and WorkerLostError where any has ended."""
        deadline = time.monotonic() + timeout
        found: dict[_Child, Any] = {}
        failed: Mapping[str, str] | None = None
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.answers, selectors.EVENT_READ, child)
            # where one refuses, the others answer too, and what they say must not be taken for the next answer
            while len(found) < len(children) and not (failed and _kind(failed) is None):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    silent = next(child for child in children if child not in found)
                    why = (
                        f"gave no answer in {timeout:g} seconds: it hangs, or one behind it that it waits for"
                    )
                    self._lost(silent, why, is_certain=False)
                for key, _ in ready:
                    child = key.data
                    answer = child.read()
                    if child.has_ended:
                        self._lost(child, child.last_words(), is_certain=True)
                    if answer is not None:
                        found[child] = answer.get("answer")
                        failed = failed or (answer if "error" in answer else None)
            if failed is not None:
                self._fail(failed, selector)
        return [found[child] for child in children]

    def _fail(self, failed: Mapping[str, str], selector: selectors.BaseSelector) -> NoReturn:
        kind = _kind(failed)
        if kind is not None:
            raise kind(failed["message"])
        # a stage complains of another that has ended: that one is the news
        deadline = time.monotonic() + LAST_WORDS
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                child: _Child = key.data
                child.read()
                if child.has_ended:
                    self._lost(child, child.last_words(), is_certain=True)
        self._broken = f"{failed['error']}: {failed['message']}"
        self._end(0)
        raise WorkerError(f"a stage has failed: {self._broken}")

    def _lost(self, child: _Child, why: str, *, is_certain: bool) -> NoReturn:
        self._broken = f"{child.name} (layers {child.layers[0]}-{child.layers[1] - 1}) {why}"
        self._end(0)
        loss = (
            "; what was learnt since the last save is lost: begin again from that" if self._has_begun else ""
        )
        raise WorkerLostError(
            self._broken + loss,
            worker=child.name,
            is_certain=is_certain,
        )


def split_options(manifest: Manifest, pieces: Mapping[str, int]) -> tuple[str, ...]:
    """What makes `shardprep split` lay tensors out as the shard set of `manifest` does.

    The part size that the set was split with is not known, nor needed: a part was ended where its layer, or the next
    piece, would not have fitted, so the largest part that holds more than one piece ends all of them at the same
    places. (One that holds a single piece may be larger than the limit was.)

    Args:
        pieces: Path of each part -> how many pieces it holds.
    """
    found = ["-tp", str(manifest.grain)]
    if manifest.stages is not None:
        found += ["--stages", ",".join(f"{start}-{stop - 1}" for start, stop in manifest.stages)]
    shared = [part.size - part.header_size for part in manifest.parts if pieces.get(part.path, 0) > 1]
    found += ["--max-part-size", str(max([1, *shared]))]
    if any(side.path.endswith(".py") for side in manifest.side_files):
        found.append("--include-code")
    if manifest.probe is not None:
        found.append("--probe")
    return tuple(found)


def _check_options(learning_rate: float, optimizer: str, weight_decay: float, **timeouts: float) -> None:
    if optimizer not in get_args(Optimizer):
        raise InputError(f"optimizer is {quote(optimizer)}, expected {' or '.join(get_args(Optimizer))}")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}, expected a number of at least 0")
    for name, value in timeouts.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}, expected seconds")


def _manifest_of(
    source: str | os.PathLike[str], revision: str, digest: str | None, access: Access | None
) -> tuple[Manifest, str]:
    if is_uri(source):
        with open_store(str(source), access) as store:
            raw, manifest = read_revision(store, revision, digest)
        return manifest, manifests.digest_of(raw)
    return read_named(source, digest=digest)


def _chosen(manifest: Manifest, stages: int | Sequence[Sequence[int]]) -> Stages:
    """Raises InputError where there is only one stage, and where the weights are not such as can be trained."""
    if manifest.quantization is not None:
        raise UnsupportedError(
            f"the model is quantized ({manifest.quantization.method}), and what is quantized cannot be trained; take "
            "the checkpoint that it was made of"
        )
    if isinstance(stages, int):
        chosen = choose_stages(manifest, pipeline_parallel_size=stages, stages=None)
    else:
        chosen = choose_stages(manifest, pipeline_parallel_size=None, stages=stages)
    if len(chosen) < 2:
        raise InputError(
            "one stage: training in one process needs no split; load the model with transformers"
        )
    return chosen


def _frozen(manifest: Manifest, freeze: Collection[Layer]) -> frozenset[Layer]:
    for each in freeze:
        if each not in PLACEMENTS and not (type(each) is int and 0 <= each < manifest.layers):
            raise InputError(
                f"freeze: {quote(each)} is no layer; there are 0 to {manifest.layers - 1}, and {', '.join(PLACEMENTS)}"
            )
    if all(line.entry.layer in freeze for line in lines_of(manifest.tensors)):
        raise InputError(NOTHING_LEFT)
    return frozenset(freeze)


def _listed(ids: torch.Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    found: Any = ids if isinstance(ids, list | tuple) else getattr(ids, "tolist", lambda: list(ids))()
    if not (
        isinstance(found, list | tuple)
        and found
        and all(isinstance(row, list | tuple) and len(row) > 1 for row in found)
        and len({len(row) for row in found}) == 1
        and all(type(each) is int and each >= 0 for row in found for each in row)
    ):
        raise InputError(IDS)
    return [list(row) for row in found]


def _make_new(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(
                f"{quote(folder)}: is not empty; nothing is overwritten: choose an empty or new folder"
            )
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{quote(folder)}: exists and is not a folder; choose another one") from None
    except OSError as error:
        raise WriteError(f"{quote(folder)}: cannot be written: {error.strerror}") from None


def _kind(failed: Mapping[str, str]) -> type[errors.ShardprepError] | None:
    """The error of ours that a stage has raised on purpose; None: something else went wrong there."""
    kind = getattr(errors, failed["error"], None)
    is_ours = isinstance(kind, type) and issubclass(kind, errors.ShardprepError)
    return kind if is_ours and kind is not WorkerLostError else None


class _Child:
    """A stage's process, as the trainer sees it: a line of JSON to it, a line of JSON from it."""

    def __init__(self, name: str, layers: tuple[int, int], log: Path) -> None:
        self.name, self.layers, self._log = name, layers, log
        self.has_ended = False
        self._read = b""
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"import {MODULE}; {MODULE}.train_worker()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                bufsize=0,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, sys.path)]),
                    "TP_SOCKET_IFNAME": LOOPBACK,
                    "GLOO_SOCKET_IFNAME": LOOPBACK,
                    "CUDA_VISIBLE_DEVICES": "",  # RPC's autograd knows no other tensors than the CPU's
                },
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._orders, self.answers = self.process.stdin, self.process.stdout
        os.set_blocking(self._orders.fileno(), False)  # one that is stopped empties no pipe

    def tell(self, order: Mapping[str, object], seconds: float) -> None:
        """Returns also where it does not take the order in time, or has ended: whoever waits for its answer is told."""
        data = memoryview(json.dumps(order).encode() + b"\n")
        deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):
            while data and (left := deadline - time.monotonic()) > 0:
                select.select([], [self._orders], [], left)
                with suppress(BlockingIOError):
                    data = data[os.write(self._orders.fileno(), data) :]

    def read(self) -> Mapping[str, Any] | None:
        """Its answer, once it is whole. Waits for some of it, or for its end."""
        more = os.read(self.answers.fileno(), 2**20)
        self.has_ended = not more
        self._read += more
        line, end, rest = self._read.partition(b"\n")
        if not end:
            return None
        self._read = rest
        found: Mapping[str, Any] = json.loads(line)
        return found

    def last_words(self) -> str:
        """How it ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_WORDS)
        status = self.process.returncode
        how = "closed its answers" if status is None else f"has ended with status {status}"
        if status is not None and status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f"{how}: {quote(lines[-1])}" if lines and (status or 0) > 0 else how

    def let_go(self) -> None:
        """Have it end, without waiting."""
        with suppress(OSError):
            self._orders.close()

    def end(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


# -------------------------------------------------------------------------------------------------- a stage's process
def train_worker() -> None:
    """What a stage's process does: it builds its stage, says so, and does what it is told until nobody tells it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), name="shardprep-orders", daemon=True).start()
    learner: _Learner | None = None
    while True:
        order = orders.get()
        answer: dict[str, object]
        try:
            if learner is None:
                learner = _Learner(order)
                answer = {"answer": None}
            else:
                answer = {"answer": getattr(learner, order.pop("do"))(**order)}
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the trainer's to say
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Ends this process, whatever it does, with the pipe by which it is told what to do."""
    with suppress(ValueError):
        for line in sys.stdin.buffer:
            orders.put(json.loads(line))
    os._exit(0)


_learner: _Learner | None = None
"""This process's, for those that call it by RPC."""


def _own() -> _Learner:
    assert _learner is not None  # RPC begins after it
    return _learner


class _Learner:
    """A stage and those of its parameters that are trained. Its public methods are the orders, but for `do_`s."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        import torch

        global _learner
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        self._options = options
        self._pp_rank: int = options["pp_rank"]
        self._stages: Stages = tuple((start, stop) for start, stop in options["stages"])
        access = options["access"]
        self.shard: Shard = open_set(
            options["source"],
            verify=options["verify"],
            digest=options["manifest_digest"],
            revision=options["revision"],
            cache=options["cache"],
            access=Access(**access) if access is not None else None,
        ).load(Place(rank=self._pp_rank, tensor_parallel_size=1, stages=self._stages))
        self.stage: Stage = stage_of(self.shard, options["folder"], dtype="float32", trainable=True)
        self.trained = self._find_trained()
        """Name in transformers' model of all layers -> parameter."""
        self._check_names()
        self._summed: dict[str, torch.Tensor] = {}
        """Name as stored -> its gradient, of parameters that other stages hold too."""
        self._optimizer: Any = None
        self._shared: dict[str, list[int]] = {}
        _learner = self

    @property
    def is_last(self) -> bool:
        return self._pp_rank == len(self._stages) - 1

    # --------------------------------------------------------------------------------------------------- orders
    def meet(self) -> None:
        """Begin RPC; returns once all stages have."""
        rpc = _rpc()
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=self._options["meeting"], rpc_timeout=self._options["timeout"]
        )
        rpc.init_rpc(
            _name(self._pp_rank),
            rank=self._pp_rank,
            world_size=len(self._stages),
            rpc_backend_options=options,
        )

    def begin(self) -> int:
        """Make the optimizer, whose parts lie with the parameters; gives how many parameters are trained."""
        rpc = _rpc()
        with warnings.catch_warnings():
            # torch compiles parts of it that are not used here, and complains of itself as it is imported
            message = r"`torch\.jit\.(script|interface)` is deprecated"
            warnings.filterwarnings("ignore", message, DeprecationWarning)
            import torch.distributed.optim as optim
        distributed: Any = optim
        everywhere = range(len(self._stages))
        parameters = [each for i in everywhere for each in rpc.rpc_sync(_name(i), _references)]
        if not parameters:
            return 0
        holders: dict[str, list[int]] = {}
        for i in everywhere:
            for name in rpc.rpc_sync(_name(i), _outside):
                holders.setdefault(name, []).append(i)
        self._shared = {name: found for name, found in holders.items() if len(found) > 1}
        # it says that this optimizer does not run without the GIL, in which nothing else wants to run here
        logging.getLogger("torch.distributed.optim.optimizer").setLevel(logging.ERROR)
        options = {"lr": self._options["learning_rate"], "weight_decay": self._options["weight_decay"]}
        self._optimizer = distributed.DistributedOptimizer(
            _make_optimizer, parameters, self._options["optimizer"], **options
        )
        return len(parameters)

    def evaluate(self, ids: list[list[int]]) -> float:
        return float(_pass_on(self._checked(ids), self._checked(ids), False))

    def step(self, ids: list[list[int]]) -> float:
        with self._backward(ids) as (loss, context):
            self._optimizer.step(context)
        return loss

    def gradients(self, ids: list[list[int]]) -> float:
        rpc = _rpc()
        with self._backward(ids) as (loss, context):
            for i in range(len(self._stages)):
                rpc.rpc_sync(_name(i), _write_gradients, args=(context,))
        return loss

    def save(self, path: str) -> dict[str, Any]:
        """Write the stage's tensors: those that were trained as they are now, others as they came."""
        import torch

        trained = self._as_stored({name: each.detach() for name, each in self.trained.items()})
        tensors: dict[str, torch.Tensor] = {}
        changed = []
        own = [
            name for name, view in self.shard.view.tensors.items() if self._owner(view.layer) == self._pp_rank
        ]
        for name in own:
            before = self.shard[name]
            tensors[name] = before
            if name in trained:
                tensors[name] = trained[name].to(before.dtype).contiguous()
                # bit by bit: -0.0 is not 0.0 to a digest
                if not torch.equal(tensors[name].view(torch.uint8), before.contiguous().view(torch.uint8)):
                    changed.append(name)
        aliases = {alias: name for alias, name in self.shard.manifest.aliases.items() if name in tensors}
        _write(Path(path), tensors, {**aliases, "format": "pt"})
        pieces: dict[str, int] = {}
        for part, piece, _, _ in self.shard.ranges():
            if piece.name in tensors:
                pieces[part.part.path] = pieces.get(part.part.path, 0) + 1
        return {
            "names": list(tensors),
            "nbytes": sum(each.nbytes for each in tensors.values()),
            "changed": changed,
            "pieces": pieces,
        }

    # ------------------------------------------------------------------------------------------------- learning
    @contextmanager
    def _backward(self, ids: list[list[int]]) -> Iterator[tuple[float, int]]:
        """The loss, and the context that holds its gradients on each stage, the shared ones summed."""
        dist_autograd = _dist_autograd()
        checked = self._checked(ids)
        with dist_autograd.context() as context:
            loss = _pass_on(checked, checked, True)
            value = float(loss)
            if not math.isfinite(value):
                raise ProblemError(
                    f"the loss is {value}; the weights are as they were before this step: begin again from what was "
                    "saved, with a lower learning rate"
                )
            dist_autograd.backward(context, [loss])
            self._sum_shared(context)
            yield value, context

    def _sum_shared(self, context: int) -> None:
        """Give each holder of a parameter that several stages hold the sum of their gradients, so that they stay equal."""
        rpc = _rpc()
        for name, holders in self._shared.items():
            asked = [rpc.rpc_async(_name(i), _gradient, args=(context, name)) for i in holders]
            found = [gradient for each in asked if (gradient := each.wait()) is not None]
            if found:
                total = sum(found[1:], found[0])
                for told in [rpc.rpc_async(_name(i), _take_gradient, args=(name, total)) for i in holders]:
                    told.wait()

    def _checked(self, ids: list[list[int]]) -> torch.Tensor:
        import torch

        highest = max(each for row in ids for each in row)
        if highest >= self.stage.vocab_size:
            raise InputError(
                f"ids: {highest} is not below {self.stage.vocab_size}, the size of the vocabulary"
            )
        most = self.stage.max_positions
        if most is not None and len(ids[0]) > most:
            raise InputError(f"ids: {len(ids[0])} positions exceed the {most} that the model was made for")
        return torch.tensor(ids)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, learn: bool) -> torch.Tensor:
        """The loss, by this stage and those behind it."""
        import torch

        rpc = _rpc()
        with torch.set_grad_enabled(learn):
            outputs = self.stage.forward(inputs)
            if not self.is_last:
                found: torch.Tensor = rpc.rpc_sync(
                    _name(self._pp_rank + 1), _pass_on, args=(outputs, labels, learn)
                )
                return found
            predicted = outputs[:, :-1].float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(predicted, labels[:, 1:].flatten())

    def gradients_of(self, context: int) -> dict[str, torch.Tensor]:
        """By name in transformers' model of all layers; zeros where the loss does not depend on a parameter."""
        import torch

        dist_autograd = _dist_autograd()
        by_parameter = dist_autograd.get_gradients(context)
        found = {}
        for name, parameter in self.trained.items():
            summed = self._summed.get(self.outside.get(name, ""))
            gradient = summed if summed is not None else by_parameter.get(parameter)
            found[name] = gradient if gradient is not None else torch.zeros_like(parameter)
        return found

    def write_gradients(self, context: int) -> None:
        path = Path(self._options["scratch"]) / f"{_name(self._pp_rank)}.gradients"
        found = self._as_stored(self.gradients_of(context))
        # safetensors cannot read a file that has neither tensors nor metadata
        _write(path, {name: each.contiguous() for name, each in found.items()}, {"format": "pt"})

    def gradient(self, context: int, stored: str) -> torch.Tensor | None:
        """Of a parameter outside of the layers, as this stage alone has it."""
        dist_autograd = _dist_autograd()
        found: torch.Tensor | None = dist_autograd.get_gradients(context).get(self._held(stored))
        return found

    def take_gradient(self, stored: str, gradient: torch.Tensor) -> None:
        self._summed[stored] = gradient

    def set_summed(self) -> None:
        """Replace this stage's own gradients by the summed ones; the optimizer is about to use them."""
        for stored, gradient in self._summed.items():
            self._held(stored).grad = gradient
        self._summed = {}

    def _held(self, stored: str) -> torch.nn.Parameter:
        name = next(name for name, each in self.outside.items() if each == stored)
        return self.trained[name]

    # ---------------------------------------------------------------------------------------------------- names
    def _find_trained(self) -> dict[str, torch.nn.Parameter]:
        """Let gradients flow into all parameters but the frozen ones."""
        frozen = frozenset(self._options["freeze"])
        first = self.stage.layers[0]
        layers = {id(module): i for i, module in enumerate(self.stage.layer_modules)}
        at = {
            f"{name}.": layers[id(module)]
            for name, module in self.stage.module.named_modules()
            if id(module) in layers
        }
        self.outside: dict[str, str] = {}
        """Name in transformers' model -> name as stored, of trained parameters outside of the layers."""
        found = {}
        for name, parameter in self.stage.module.named_parameters():
            if parameter.is_meta:
                continue
            prefix = next((each for each in at if name.startswith(each)), None)
            layer: Layer
            if prefix is not None:
                layer = first + at[prefix]
                container = prefix.removesuffix(".").rpartition(".")[0]
                name = f"{container}.{layer}.{name.removeprefix(prefix)}"
            else:
                stored = next(iter(self._as_stored({name: parameter.detach().to("meta")})))
                self._check_stored(stored)
                layer = self.shard.manifest.tensors[stored].layer
                if layer not in frozen:
                    self.outside[name] = stored
            parameter.requires_grad_(layer not in frozen)
            if layer not in frozen:
                found[name] = parameter
        return found

    def _check_names(self) -> None:
        """Raise UnsupportedError unless what is trained can be saved."""
        bare = {name: parameter.detach().to("meta") for name, parameter in self.trained.items()}
        for name, tensor in self._as_stored(bare).items():
            self._check_stored(name)
            form = self.shard.manifest.tensors[name].form
            if form.dtype not in TRAINED:
                raise UnsupportedError(
                    f"{quote(name)}: {form.dtype} cannot be trained, only {', '.join(TRAINED)}; freeze its layer"
                )
            if tuple(tensor.shape) != form.shape:
                raise UnsupportedError(
                    f"{quote(name)}: the model has it as {list(tensor.shape)}, the checkpoint as {list(form.shape)}; it "
                    "could not be saved: freeze its layer"
                )

    def _check_stored(self, name: str) -> None:
        if name not in self.shard.view.tensors:
            raise UnsupportedError(
                f"{quote(name)}: transformers would save a parameter under this name, which the checkpoint does not "
                "have; models whose weights were renamed cannot be trained here"
            )

    def _as_stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of transformers' model of all layers, as a checkpoint has them: experts apart, names as stored."""
        from transformers.core_model_loading import revert_weight_conversion

        module: Any = self.stage.module
        manifest = self.shard.manifest
        found = {}
        for name, tensor in revert_weight_conversion(module, dict(tensors)).items():
            base = f"{getattr(module, 'base_model_prefix', '')}."
            for each in (name, name.removeprefix(base), base + name):
                stored = manifest.aliases.get(each) or manifest.tied.get(each) or each
                if stored in manifest.tensors:
                    name = stored
                    break
            found[name] = tensor
        return found

    def _owner(self, layer: Layer) -> int:
        """The stage that saves a layer's tensors, of those that hold them."""
        if isinstance(layer, int):
            return next(i for i, (start, stop) in enumerate(self._stages) if start <= layer < stop)
        return len(self._stages) - 1 if layer == "last" else 0


def _rpc() -> Any:
    from torch.distributed import rpc

    return rpc


def _dist_autograd() -> Any:
    from torch.distributed import autograd

    return autograd


def _name(pp_rank: int) -> str:
    return f"stage-{pp_rank}"


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole: a temporary name, fsync, rename."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.new")
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        why = error.strerror if isinstance(error, OSError) else error
        raise WriteError(f"{quote(path)}: cannot be written: {why}") from None


def _make_optimizer(
    parameters: list[torch.nn.Parameter], name: Optimizer, **options: float
) -> torch.optim.Optimizer:
    """What a stage's part of the optimizer is. Not a class that torch knows, which it would compile."""
    import torch

    kinds: dict[Optimizer, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    found: torch.optim.Optimizer = kinds[name](parameters, **options)
    found.register_step_pre_hook(lambda *_: _own().set_summed())
    # a parameter that the next loss does not depend on must not learn from this one's gradient again
    found.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad(set_to_none=True))
    return found


# ------------------------------------------------------------------------------------------ what stages ask of another
def _pass_on(inputs: torch.Tensor, labels: torch.Tensor, learn: bool) -> torch.Tensor:
    return _own().forward(inputs, labels, learn)


def _references() -> list[Any]:
    rpc = _rpc()
    return [rpc.RRef(parameter) for parameter in _own().trained.values()]


def _outside() -> list[str]:
    return list(_own().outside.values())


def _gradient(context: int, stored: str) -> torch.Tensor | None:
    return _own().gradient(context, stored)


def _take_gradient(stored: str, gradient: torch.Tensor) -> None:
    _own().take_gradient(stored, gradient)


def _write_gradients(context: int) -> None:
    _own().write_gradients(context)
