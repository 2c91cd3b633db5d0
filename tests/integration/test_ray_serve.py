"""Ray Serve starts our workers from a store, asks the model for its health, and replaces what has died.

Ray and its processes run beside this one, in a program that takes orders: they are in warnings, threads and sockets of
their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from s3fixtures import isolate, put_shard_set
from s3server import S3Server
from shardprep.split import split
from shardprep_runtime import read_manifest
from shardprep_runtime.errors import InputError, IntegrityError, ShardprepError
from shardprep_runtime.format.manifest import digest_of
from shardprep_runtime.format.view import Place
from shardprep_runtime.shard.shard_set import open_set
from shardprep_runtime.stores.open import open_store
from shardprep_runtime.stores.store import Access
from shardprep_runtime.workers.ray_serve import Options, read_options

TINY = Path(__file__).parents[1] / "data/tiny-llama"
MANIFESTS = Path(__file__).parents[2] / "manifests/ray"
PROMPT = "def "
TOKENS = 12
SECRET = "what the test has made up for /control"

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("starlette") is None,
    reason='needs Ray: pip install "shardprep[ray]"',
)

DRIVER = """
import json, os, sys

lines = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray prints what its workers print
import ray
from ray import serve

# not 127.0.0.1, which Ray takes for an address to be replaced by one that other hosts reach
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=sys.argv[1],
         _node_ip_address="127.0.0.2")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})

def run(name, args):
    from shardprep_runtime.workers.ray_serve import build

    serve.run(build(args), name=name, route_prefix="/" + name)

def status(name):
    found = serve.status().applications[name]
    return [found.status, found.message, [each.message for each in found.deployments.values()]]

def delete(name):
    serve.delete(name)

def llm(config):
    '''What ray.serve.llm does with a callback before it starts an engine: in the replica, then in a task on each node.'''
    import asyncio
    from ray.llm._internal.common.utils.download_utils import download_model_files
    from ray.llm._internal.common.utils.import_utils import load_class
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = LLMConfig.model_validate(config)
    group = ray.util.placement_group(config.placement_group_config["bundles"])
    ray.get(group.ready())
    callback = load_class(config.callback_config.callback_class)(
        llm_config=config, raise_error_on_callback=True, **config.callback_config.callback_kwargs,
        ctx_kwargs={"placement_group": group, "runtime_env": {}},
    )
    asyncio.run(callback.run_callback("on_before_node_init"))

    def on_node(callback):
        return download_model_files(
            model_id=callback.llm_config.model_loading_config.model_source, mirror_config=None,
            download_model=callback.ctx.worker_node_download_model, callback=callback,
        )

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    found = ray.get(ray.remote(on_node).options(num_cpus=0, scheduling_strategy=here).remote(callback))
    ray.util.remove_placement_group(group)
    return [found, callback.ctx.worker_node_download_model.name]

def answer(result=None, error=None):
    lines.write(json.dumps({"result": result, "error": error}) + "\\n")
    lines.flush()

answer()
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        answer(globals()[name](*arguments))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
serve.shutdown()
ray.shutdown()
"""

GREEDY = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
given = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
found = {}
for dtype in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    found[dtype] = model.generate(**given, max_new_tokens=count, do_sample=False)[0, given.input_ids.shape[1]:].tolist()
print(json.dumps(found))
"""


@dataclass
class Cluster:
    """Ray with Serve, the store that it starts from, and what transformers says of the original checkpoint."""

    folder: Path
    port: int
    shards: Path
    digest: str
    greedy: dict[str, list[int]]
    process: subprocess.Popen[str]

    def order(self, *job: object) -> Any:
        """What the program answers; raises RuntimeError with what Ray says went wrong."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 180)
        line = self.process.stdout.readline() if ready else ""
        assert line, f"Ray gives no answer:\n{self.log()[-5000:]}"
        found = json.loads(line)
        if found["error"] is not None:
            raise RuntimeError(found["error"])
        return found["result"]

    def log(self) -> str:
        """What Ray and its workers have printed so far."""
        return (self.folder / "log").read_text(errors="replace")

    def ask(self, path: str, body: object = None, *, timeout: float = 60) -> tuple[int, Any]:
        """Status and JSON of an answer; status 0 where there was none in time."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {SECRET}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode()
            return error.code, json.loads(text) if text.startswith("{") else text
        except OSError:
            return 0, None

    def greedy_tokens(self, app: str) -> list[int]:
        status, found = self.ask(
            f"/{app}/v1/completions",
            {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True},
        )
        assert status == 200, found
        assert found["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": TOKENS,
            "total_tokens": 3 + TOKENS,
        }
        tokens: list[int] = found["choices"][0]["token_ids"]
        return tokens

    def healthy(self, app: str, *, other_than: int, seconds: float = 120) -> dict[str, Any]:
        """What a worker of the application says, once one other than that of process `other_than` is healthy."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ask(f"/{app}/health", timeout=15)[0] == 200:
                status, found = self.ask(f"/{app}/control/workers", timeout=5)
                if status == 200 and found["workers"][0]["pid"] != other_than:
                    return dict(found["workers"][0])
            time.sleep(0.2)
        raise AssertionError(f"no replica in {seconds} s:\n{self.log()[-5000:]}")


def processes(title: str) -> list[int]:
    """Those that Ray calls so."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if each.read_bytes().startswith(f"ray::{title}".encode()):
                found.append(int(each.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # the path of Ray's sockets, in a folder of a long name below this, may have 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    shards = tmp_path_factory.mktemp("ray") / "tiny-tp4"
    split(TINY, shards, tensor_parallel_size=4)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, S3Server(folder / "s3") as server:
        isolate(patch, folder, server)
        server.make_bucket("shards")
        with open_store("s3://shards/tiny-llama") as store:
            put_shard_set(store, shards)
        for name, value in {
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",  # Ray listens on all addresses, whatever it is told
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_DEDUP_LOGS": "0",
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "SHARDPREP_CACHE_DIR": str(folder / "cache"),
            "SHARDPREP_SECRET": SECRET,
        }.items():
            patch.setenv(name, value)
        with (folder / "log").open("w") as log:
            greedy = subprocess.Popen(
                [sys.executable, "-c", GREEDY, str(TINY), PROMPT, str(TOKENS)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder / "ray"), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            with greedy, process:
                tokens = json.loads(greedy.communicate(timeout=60)[0])
                digest = digest_of((shards / "shardprep.json").read_bytes())
                found = Cluster(folder, port, shards, digest, tokens, process)
                try:
                    found.answer()
                    yield found
                    assert process.stdin is not None
                    process.stdin.close()
                    process.wait(60)
                finally:
                    process.kill()
    shutil.rmtree(folder)


ray_is_slow = [needs_ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


class TestServe:
    """Ray and Serve are started once: that takes longer than most of what is asked of them."""

    pytestmark = ray_is_slow

    def test_a_wrong_manifest_digest_is_the_reason_that_nothing_starts(self, cluster: Cluster) -> None:
        wrong = "sha256:" + "0" * 64
        with pytest.raises(RuntimeError, match="wrong") as error:
            cluster.order("run", "wrong", {"source": "s3://shards/tiny-llama", "manifest_digest": wrong})
        status, message, deployments = cluster.order("status", "wrong")
        assert status == "DEPLOY_FAILED"
        reason = f"its digest is {cluster.digest}, expected {wrong}; do not load it"
        assert any(reason in each for each in (str(error.value), message, *deployments)), deployments
        assert cluster.ask("/wrong/health", timeout=5)[0] != 200
        cluster.order("delete", "wrong")

    def test_a_damaged_byte_is_the_reason_that_nothing_starts(self, cluster: Cluster, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(cluster.shards, damaged)
        part = sorted(damaged.glob("*.safetensors"))[1]
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
        with pytest.raises(RuntimeError, match="damaged") as error:
            cluster.order("run", "damaged", {"source": str(damaged)})
        status, message, deployments = cluster.order("status", "damaged")
        assert status == "DEPLOY_FAILED"
        said = "\n".join((str(error.value), message, *deployments))
        assert "IntegrityError" in said
        assert part.name in said
        cluster.order("delete", "damaged")

    def test_a_worker_answers_as_the_original_and_a_killed_replica_comes_back(self, cluster: Cluster) -> None:
        cluster.order(
            "run", "one", {"source": str(cluster.shards), "model": "tiny", "health_check_period_s": 0.5}
        )
        worker = cluster.healthy("one", other_than=0)
        assert worker["manifest_digest"] == cluster.digest
        assert list(worker["seconds"]) == [
            "imports", "front end", "config", "fetch and verify", "build", "first forward",
        ]  # fmt: skip
        assert "shardprep: stage-0: stage 0, layers 0 to 5: " in cluster.log()
        assert cluster.ask("/one/v1/models")[1]["data"][0]["id"] == "tiny"
        assert cluster.greedy_tokens("one") == cluster.greedy["bfloat16"]
        for body, status, reason in (
            ({"prompt": PROMPT, "max_tokens": 1000}, 400, "256"),
            ({"prompt": [1, 2048]}, 400, "2048"),
            ({"prompt": PROMPT, "n": 2}, 400, "n: 2 was asked for"),
            ({"prompt": PROMPT, "model": "gpt"}, 404, "no model gpt; there is tiny"),
        ):
            found = cluster.ask("/one/v1/completions", body)
            assert found[0] == status
            assert reason in found[1]["error"]["message"]
            assert "Traceback" not in found[1]["error"]["message"]
        self.check_streams(cluster)
        (replica,) = processes("ServeReplica:one:")
        os.kill(replica, signal.SIGKILL)
        again = cluster.healthy("one", other_than=worker["pid"])
        assert again["pid"] not in (replica, worker["pid"])
        assert cluster.greedy_tokens("one") == cluster.greedy["bfloat16"]
        cluster.order("delete", "one")

    @staticmethod
    def check_streams(cluster: Cluster) -> None:
        """Texts come token by token, and end where they are told to."""
        whole = cluster.ask("/one/v1/completions", {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
        text = whole[1]["choices"][0]["text"]
        body = {
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "top_k": 5,
            "stop": [text[-3:]],
            "stream": True,
        }
        status, said = cluster.ask("/one/v1/completions", body)
        assert status == 200
        events = [line.removeprefix("data: ") for line in said.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert len(events) > 3
        streamed = "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1])
        assert streamed == text[: text.index(text[-3:])]

    def test_two_workers_share_a_model_from_a_store_and_a_killed_one_is_replaced(
        self, cluster: Cluster
    ) -> None:
        args = {
            "source": "s3://shards/tiny-llama",
            "tensor_parallel_size": "2",  # as text, as a command line gives it
            "dtype": "float32",
            "health_check_period_s": 0.5,
        }
        cluster.order("run", "two", args)
        leader = cluster.healthy("two", other_than=0)
        total = read_manifest(cluster.shards).nbytes
        ready = re.findall(
            r"stage-0: (tensor rank 1: )?stage 0.*: ([\d,]+) bytes, ([\d,]+) of them", cluster.log()
        )
        held, fetched = ([int(each[which].replace(",", "")) for each in ready[-2:]] for which in (1, 2))
        assert sorted(each[0] for each in ready[-2:]) == ["", "tensor rank 1: "]
        assert max(held) < 0.51 * 2 * total  # in float32, of 2 bytes each that are stored
        assert total <= sum(fetched) < 1.02 * total
        workers = processes("WorkerActor")
        assert len(workers) == 2
        assert leader["pid"] in workers
        assert cluster.greedy_tokens("two") == cluster.greedy["float32"]
        sampled = {"prompt": PROMPT, "max_tokens": 20, "seed": 7, "temperature": 1.5}
        texts = [cluster.ask("/two/v1/completions", sampled)[1]["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1]

        # its peer is left alone in the middle of a forward
        with ThreadPoolExecutor(1) as pool:
            long = {"prompt": PROMPT, "max_tokens": 250, "temperature": 0}
            asked = pool.submit(cluster.ask, "/two/v1/completions", long)
            time.sleep(1)
            assert not asked.done()
            os.kill(next(each for each in workers if each != leader["pid"]), signal.SIGKILL)
            status, found = asked.result()
        assert status == 503, found
        assert "stage 0" in found["error"]["message"]
        again = cluster.healthy("two", other_than=leader["pid"])
        assert cluster.greedy_tokens("two") == cluster.greedy["float32"]
        assert again["bytes_fetched"] == 0  # the host's cache has it all
        assert len(processes("WorkerActor")) == 2
        cluster.order("delete", "two")

    def test_the_callback_brings_a_node_its_ranks_and_no_more(self, cluster: Cluster) -> None:
        config = llm_config("vllm.yaml")
        node = cluster.folder / "node/tiny"
        config["model_loading_config"]["model_source"] = str(node)
        config["engine_kwargs"] = {
            "tensor_parallel_size": 2,
            "load_format": "shardprep",
            "model_loader_extra_config": {
                "uri": "s3://shards/tiny-llama",
                "manifest_digest": cluster.digest,
                "cache": str(cluster.folder / "node/cache"),
            },
        }
        config |= {"accelerator_type": None, "placement_group_config": {"bundles": [{"CPU": 1}] * 2}}
        assert cluster.order("llm", config) == [str(node), "NONE"]
        assert (node / "shardprep.json").read_bytes() == (cluster.shards / "shardprep.json").read_bytes()
        assert (node / "config.json").read_bytes() == (TINY / "config.json").read_bytes()
        assert not list(node.rglob("*.safetensors*"))
        end = time.monotonic() + 30
        while not all(self.is_in_cache(cluster, rank) for rank in (0, 1)):
            assert time.monotonic() < end
            time.sleep(0.1)

    @staticmethod
    def is_in_cache(cluster: Cluster, rank: int) -> bool:
        """Whether vLLM's rank finds all of its shard in the node's cache: the store is not asked."""
        try:
            with open_set("file:///nowhere", digest=cluster.digest, cache=cluster.folder / "node/cache").load(
                Place(rank=rank, tensor_parallel_size=2, engine="vllm")
            ) as shard:
                shard.wait()
                return shard.bytes_fetched == 0
        except ShardprepError:
            return False


# -------------------------------------------------------------------------------------------------- what needs no cluster
def llm_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = serve_config(name)["applications"][0]["args"]["llm_configs"][0]
    return config


def serve_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((MANIFESTS / name).read_text())
    return config


def test_the_service_of_kuberay_has_the_same_application() -> None:
    service = serve_config("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == serve_config("vllm.yaml")


def test_the_workers_manifest_is_made_of_options() -> None:
    (application,) = serve_config("workers.yaml")["applications"]
    assert application["import_path"] == "shardprep_runtime.workers.ray_serve:build"
    assert read_options(application["args"]).tensor_parallel_size == 2


def test_a_side_file_that_was_edited_is_refused(tmp_path: Path) -> None:
    split(TINY, tmp_path / "set", tensor_parallel_size=2)
    with open_set(tmp_path / "set").side_files() as found:
        assert found == tmp_path / "set"
    (tmp_path / "set/README.md").unlink()
    with open_set(tmp_path / "set/shardprep.json").side_files() as found:
        assert found == tmp_path / "set"
    config = tmp_path / "set/config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with (
        pytest.raises(IntegrityError, match=r"config\.json: does not match its digest"),
        open_set(tmp_path / "set").side_files(),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({}, "source: give the folder or URI"),
        ({"source": "x", "tp": 2}, "tp is not known; shardprep takes source, .*tensor_parallel_size"),
        ({"source": "x", "tensor_parallel_size": "two"}, "tensor_parallel_size is two, expected int"),
        ({"source": "x", "tensor_parallel_size": 0}, "tensor_parallel_size is 0, expected at least 1"),
        ({"source": "x", "tensor_parallel_size": True}, "tensor_parallel_size is True, expected int"),
        ({"source": "x", "no_sign_request": "maybe"}, "no_sign_request is maybe, expected bool"),
        ({"source": "x", "verify": "some"}, "verify is some; use blocks, headers or off"),
    ],
)
def test_options_that_are_none_are_refused(args: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_options(args)


def test_options_from_a_command_line_are_text() -> None:
    found = read_options(
        {
            "source": "s3://b/m/",
            "tensor_parallel_size": "2",
            "cache": "none",
            "no_sign_request": "true",
            "workers": "4",
        }
    )
    expected = open_set("s3://b/m/", cache=None, access=Access(anonymous=True), connections=4)
    assert found == Options(shard_set=expected, tensor_parallel_size=2)
    assert found.name == "m"


@needs_ray
@pytest.mark.slow
def test_the_manifests_are_configs_of_serve() -> None:
    code = (
        "import sys, yaml\n"
        "from ray.serve.schema import ServeDeploySchema\n"
        "from ray.llm._internal.serve.core.configs.llm_config import LLMConfig\n"
        "from shardprep_runtime.engines.ray_llm import read_config\n"
        "for path in sys.argv[1:]:\n"
        "    ServeDeploySchema.model_validate(yaml.safe_load(open(path)))\n"
        "args = yaml.safe_load(open(sys.argv[1]))['applications'][0]['args']\n"
        "print(read_config(LLMConfig.model_validate(args['llm_configs'][0])).shard_set.source)\n"
    )
    paths = [str(MANIFESTS / name) for name in ("vllm.yaml", "workers.yaml")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "s3://example-models/llama-3.3-70b-instruct"


RANKS = """
import json, sys
from shardprep_runtime.engines.options import read_options
from shardprep_runtime.shard.prefetch_command import parser
from shardprep_runtime.engines.ray_llm import Wanted, prefetch_arguments, ranks_of
from pathlib import Path

gpus = {index: {"GPU": 1.0} for index in range(4)}
def ranks(nodes, node, engine_node, bundles=gpus):
    return list(ranks_of(bundles, dict(enumerate(nodes)), size=4, node=node, engine_node=engine_node))

shard_set = read_options({"revision": "r1", "workers": 8, "anonymous": True, "uri": "s3://b/m"}).shard_set
wanted = Wanted(shard_set, Path(sys.argv[1]), 2, 4, True)
print(json.dumps([
    ranks("aaaa", "a", "a"),
    ranks("aabb", "a", "a"), ranks("aabb", "b", "a"),
    ranks("bbaa", "a", "a"), ranks("bbaa", "b", "a"),
    ranks("abca", "a", "a"), ranks("abca", "b", "a"),
    ranks("aabb", "b", "c"), ranks("aabb", "b", None),
    ranks("caaaa", "a", "a", {0: {"CPU": 1.0}, **{index: {"GPU": 1.0} for index in range(1, 5)}}),
    ranks("aa", "a", "a", {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}),
    vars(parser().parse_args(prefetch_arguments(wanted, range(2, 6))[:-2])),
]))
"""


@needs_ray
def test_a_node_fetches_the_ranks_that_vllm_deals_to_it(tmp_path: Path) -> None:
    split(TINY, tmp_path / "set", tensor_parallel_size=2, stages=[(0, 1), (1, 6)])
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path / "set")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *ranks, options = json.loads(done.stdout)
    assert ranks == [
        [0, 1, 2, 3],
        *([0, 1], [2, 3]),
        *([0, 1], [2, 3]),  # the engine's node first, whichever bundles it has
        *([0, 1], []),  # of three nodes the order of the others is open
        *([], []),  # an engine elsewhere
        [0, 1, 2, 3],  # bundles without a device are none of a rank
        [],  # fewer than ranks
    ]
    expected = {
        "source": "s3://b/m",
        "engine": "vllm",
        "ranks": "2-5",
        "tensor_parallel_size": 2,
        "expert_parallel_size": 2,
        "stages": "0-0,1-2,3-4,5-5",  # vLLM's stages of six layers, not those of the split
        "revision": "r1",
        "max_workers": 8,
        "no_sign_request": True,
        "manifest_digest": digest_of((tmp_path / "set/shardprep.json").read_bytes()),
    }
    assert {name: options[name] for name in expected} == expected
