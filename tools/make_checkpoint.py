#!/usr/bin/env python3
"""Train a small Llama on the Python standard library and save it the way models are published.

The text is on every machine that has a Python, so the checkpoint needs no download. It is real in what counts for
tests: a tokenizer that loads offline, grouped KV heads, several files with an index, and weights that predict
held-out text far better than chance, so that a wrongly cut tensor shows as a worse perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import tokenizers
import torch
import transformers
from torch import Tensor, nn

STDLIB = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {
    "site-packages",  # not the standard library
    "dist-packages",
    "test",  # larger than all the rest together
    "tests",
    "idle_test",
    "encodings",  # tables
    "pydoc_data",  # one file, a copy of the manual
}
HELD_OUT = ("bisect.py", "shlex.py", "textwrap.py")  # whole files that are like nothing else in the library
BOS, EOS, PAD = SPECIAL = ("<s>", "</s>", "<pad>")
CONTEXT = 256  # tokens
BATCH = 4  # windows of CONTEXT tokens; with so little time, many small steps learn more than few large ones
PEAK_LEARNING_RATE = 4e-3
WARM_UP = 0.05  # of the steps


def training_files() -> Iterator[Path]:
    """The library's sources in one order on every machine, without those that differ between builds."""
    for name in sorted(path.relative_to(STDLIB).as_posix() for path in STDLIB.rglob("*.py")):
        of_this_build = name.startswith(("_sysconfigdata", "config-"))
        if name not in HELD_OUT and not of_this_build and LEFT_OUT.isdisjoint(name.split("/")):
            yield STDLIB / name


def train_tokenizer(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text has tokens, and decodes to itself."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def model_config(options: argparse.Namespace) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=options.tied,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return PEAK_LEARNING_RATE * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return PEAK_LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * done))


def train(model: nn.Module, stream: Tensor, *, steps: int) -> None:
    """Train on windows of `stream` in random order, each once before any comes again."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    windows = stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    passes = math.ceil(steps * BATCH / len(windows))
    order = torch.cat([torch.randperm(len(windows)) for _ in range(passes)])
    model.train()
    began = time.monotonic()
    for step, chosen in enumerate(order.split(BATCH)[:steps]):  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        batch = windows[chosen]
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            spent = time.monotonic() - began
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {spent:.0f} s", file=sys.stderr)


def save(
    model: transformers.LlamaForCausalLM,
    folder: Path,
    *,
    dtype: torch.dtype,
    kind: str,
    max_shard_size: str,
    tied: bool,
) -> None:
    """Write the weights, their index and both configs."""
    model.to(dtype)  # type: ignore[arg-type]  # transformers wraps it, and its type then wants the model
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    huggingface_hub.save_torch_state_dict(
        model.state_dict(),  # when tied it holds both names, and a pickle keeps that they are one storage
        folder,
        max_shard_size=max_shard_size,
        safe_serialization=kind == "safetensors",
        shared_tensors_to_discard=["lm_head.weight"] if tied else None,  # read for safetensors alone
    )


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # the class as every version of transformers knows it; 5 writes a name that 4 has not heard of
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    # transformers 5 no longer writes this file; published models have it
    special = {f"{name}_token": token for name, token in zip(("bos", "eos", "pad"), SPECIAL, strict=True)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean loss over all tokens but the first, the context starting anew every CONTEXT tokens."""
    model.eval()
    loss = 0.0
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        loss += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(loss / (len(tokens) - 1))


def unigram_perplexity(stream: Tensor, tokens: Tensor, vocab_size: int) -> float:
    """What the token frequencies of the training text alone achieve, each token counted once more."""
    counts = torch.bincount(stream, minlength=vocab_size) + 1.0
    return math.exp(-(counts / counts.sum()).log()[tokens[1:]].mean().item())


README = """\
---
license: other
license_name: psf-2.0
license_link: LICENSE
---
# A small Llama for tests

{parameters:,} parameters in {dtype}, trained on the sources of Python {python}'s standard library. It writes things
that look like Python. It exists so that tools for checkpoints can be tried on a real one, and is of no other use.

| perplexity | per token |
|---|---|
| uniform over the vocabulary | {uniform} |
| unigram, held-out text | {unigram:.1f} |
| model, training text | {trained:.2f} |
| model, held-out text | {held_out:.2f} |

Held out were the whole files {held_out_files}; `heldout.txt` is the three of them joined,
{held_out_tokens:,} tokens. Its perplexity is that of the saved weights, read as float32: exp of the mean loss over all
tokens but the first (`{bos}`, which the tokenizer adds), with the context starting anew every {context} tokens: inputs
`tokens[i:i+{context}]`, targets one further, i = 0, {context}, ... The training text's is the same over its first
{sample:,} tokens.

## How it was made
```
{command}
```
Seed {seed}, {steps} steps of {batch} x {context} tokens ({seen:.1f} M, from the {text:.1f} M of {files} files), {seconds:.0f} s of
training with {threads} threads. Python {python}, torch {torch}, transformers {transformers},
tokenizers {tokenizers}, huggingface_hub {hub}, {machine}.
The same command gives the same text and tokenizer wherever Python and tokenizers are the same, and the same
weights on the same machine.

## Licence
`heldout.txt` is text of the Python standard library, and the weights and the tokenizer are derived from the library:
Copyright (c) 2001 Python Software Foundation; All Rights Reserved. The licence (PSF-2.0 and what it incorporates) is
in `LICENSE`.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist or is empty")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=False, help="share the head")
    parser.add_argument("--untied", dest="tied", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--format", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--max-shard-size", default="4MB", help="of one file, as huggingface_hub reads it")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is not an empty folder; choose another, or remove it first")
    return options


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    files = list(training_files())
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    held_out_text = "".join((STDLIB / name).read_text(encoding="utf-8") for name in HELD_OUT)
    tokenizer = train_tokenizer(texts, options.vocab)
    if len(tokenizer) != options.vocab:
        sys.exit(f"the text gives {len(tokenizer)} tokens, not {options.vocab}; choose a smaller --vocab")
    end = [tokenizer.eos_token_id]
    stream = torch.tensor(
        [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids + end]
    )
    held_out = torch.tensor(tokenizer(held_out_text, verbose=False)["input_ids"])
    sample = stream[: len(held_out)]

    model = transformers.LlamaForCausalLM(model_config(options))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} tokens in {len(files)} files", file=sys.stderr)
    began = time.monotonic()
    train(model, stream, steps=options.steps)
    seconds = time.monotonic() - began

    options.out.mkdir(parents=True, exist_ok=True)
    save(
        model,
        options.out,
        dtype=getattr(torch, options.dtype),
        kind=options.format,
        max_shard_size=options.max_shard_size,
        tied=options.tied,
    )
    save_tokenizer(tokenizer, options.out)
    (options.out / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    if (STDLIB / "LICENSE.txt").exists():
        shutil.copyfile(STDLIB / "LICENSE.txt", options.out / "LICENSE")

    # of what was saved, not of what was trained
    saved = transformers.AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    unigram = unigram_perplexity(stream, held_out, options.vocab)
    trained, held_out_result = perplexity(saved, sample), perplexity(saved, held_out)
    readme = README.format(
        parameters=parameters,
        dtype=options.dtype,
        uniform=options.vocab,
        unigram=unigram,
        trained=trained,
        held_out=held_out_result,
        held_out_files=", ".join(f"`{name}`" for name in HELD_OUT),
        held_out_tokens=len(held_out),
        bos=BOS,
        context=CONTEXT,
        sample=len(sample),
        command=shlex.join(["tools/make_checkpoint.py", *sys.argv[1:]]),
        seed=options.seed,
        steps=options.steps,
        batch=BATCH,
        seen=options.steps * BATCH * CONTEXT / 1e6,
        text=len(stream) / 1e6,
        files=len(files),
        seconds=seconds,
        threads=options.threads,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        hub=huggingface_hub.__version__,
        machine=f"{platform.system()} {platform.machine()}",
    )
    (options.out / "README.md").write_text(readme, encoding="utf-8")
    print(f"perplexity: uniform {options.vocab}, unigram {unigram:.1f} on held-out text")
    print(f"            model {trained:.2f} on training text, {held_out_result:.2f} on held-out text")


if __name__ == "__main__":
    main()
