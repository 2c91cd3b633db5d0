"""Load checkpoints with vLLM as they are, and say what it makes of them: perplexity of token ids, and greedy tokens.

Runs in an environment with vLLM, which `scripts/make_vllm` makes as .venv-vllm:

    .venv-vllm/bin/python tools/check_vllm_quantized.py FOLDER ... --tokens held-out.jsonl

Writes a line of JSON for each folder. Exits with 1 if vLLM refuses one, whose line has `error` then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apart import QUIET, tell, told

DTYPES = ("auto", "bfloat16", "float16", "float32")


def main() -> int:
    options = parse()
    if options.here:
        tell(examine(options.folders[0], options))
        return 0
    try:
        import vllm
    except ImportError as error:
        print(
            f"{sys.executable} has no vLLM ({error}): scripts/make_vllm makes .venv-vllm, which has",
            file=sys.stderr,
        )
        return 2
    failed = False
    for folder in options.folders:
        started = time.monotonic()
        found = apart(folder, options)
        found = {"folder": str(folder), "vllm": vllm.__version__, **found}
        print(json.dumps({**found, "seconds": round(time.monotonic() - started, 1)}), flush=True)
        failed |= "error" in found
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a checkpoint with config.json"
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="JSON lines, a list of token ids each: the perplexity of these is measured",
    )
    parser.add_argument(
        "--prompt", type=int, nargs="+", metavar="ID", help="go on from these [the first line's first 8]"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="go on for so many tokens [16]"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of what is not quantized [config.json's]"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU [1]")
    parser.add_argument("--logprobs", action="store_true", help="also the log probability of every token")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for folder in options.folders:
        if not (folder / "config.json").is_file():
            parser.error(f"{folder}: no checkpoint: it has no config.json")
    if options.tokens is None and options.prompt is None:
        parser.error("nothing to ask: give --tokens FILE, or --prompt ID ...")
    if options.tokens is not None:
        try:
            sequences(options.tokens)
        except (OSError, ValueError) as error:
            parser.error(f"--tokens {options.tokens}: {error}")
    return options


def sequences(file: Path) -> list[list[int]]:
    """The token ids of a file of JSON lines. Raises ValueError for anything else."""
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        ids = json.loads(line)
        if not isinstance(ids, list) or len(ids) < 2 or not all(type(each) is int for each in ids):
            raise ValueError(f"line {number} is no list of two or more token ids")
        found.append(ids)
    if not found:
        raise ValueError("it is empty")
    return found


def apart(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds: vLLM keeps much of a model until its process ends."""
    command = [sys.executable, __file__, str(folder), "--here", "--dtype", options.dtype]
    command += ["--new-tokens", str(options.new_tokens)]
    command += ["--tokens", str(options.tokens)] if options.tokens else []
    command += ["--prompt", *map(str, options.prompt)] if options.prompt else []
    command += ["--logprobs"] if options.logprobs else []
    own = {"OMP_NUM_THREADS": str(options.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ended = subprocess.run(
        command,
        env={**os.environ, **QUIET, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    if (found := told(ended.stdout)) is not None:
        return found
    return {"error": reason(ended.stderr), "exit_code": ended.returncode}


def reason(log: str) -> str:
    """The last line of a log that names an error, with what follows it: some libraries tell the reason there."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "Error" in line.split(":")[0]]
    if not errors:
        return lines[-1] if lines else "no reason was given"
    return " ".join(lines[errors[-1] : errors[-1] + 3])


def examine(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load one checkpoint in this process and ask it."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    model = LLM(
        str(folder),
        dtype=options.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,  # a checkpoint need not have one to be asked with token ids
        enable_prefix_caching=False,  # of a cached prefix no log probabilities are computed
        gpu_memory_utilization=0.5,
        max_num_seqs=8,
        seed=0,
        disable_log_stats=True,
    )
    config = model.llm_engine.model_config
    texts = sequences(options.tokens) if options.tokens else []
    found: dict[str, Any] = {
        "quantization": config.quantization,
        "dtype": str(config.dtype).removeprefix("torch."),
    }
    if texts:
        room = config.max_model_len - 1  # one token must be made for each
        asked = [ids[:room] for ids in texts]
        answers = model.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in asked],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        logs = [
            [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
            for answer, ids in zip(answers, asked, strict=True)
        ]
        count = sum(map(len, logs))
        found |= {"tokens": count, "perplexity": math.exp(-sum(map(sum, logs)) / count)}
        if options.logprobs:
            found["logprobs"] = logs
    prompt = options.prompt or texts[0][:8]
    (answer,) = model.generate(
        [TokensPrompt(prompt_token_ids=prompt)],
        SamplingParams(
            temperature=0, max_tokens=options.new_tokens, logprobs=0, detokenize=False, ignore_eos=True
        ),
        use_tqdm=False,
    )
    made = list(answer.outputs[0].token_ids)
    found |= {"prompt": prompt, "greedy": made}
    if options.logprobs:
        found["greedy_logprobs"] = [
            entry[token].logprob for entry, token in zip(answer.outputs[0].logprobs, made, strict=True)
        ]
    if (text := decoded(folder, [*prompt, *made])) is not None:
        found["text"] = text
    return found


def decoded(folder: Path, ids: Sequence[int]) -> str | None:
    """The text of token ids; None where the checkpoint has no tokenizer.json."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    text: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(
        list(ids), skip_special_tokens=True
    )
    return text


if __name__ == "__main__":
    sys.exit(main())
