"""The example manifests and images say what exists: fields, flags, ports, volumes and versions, without any cluster."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource

from shardprep.cli import main as shardprep
from shardprep.vllm.serve import read_sizes
from shardprep_runtime import __version__
from shardprep_runtime.environment import cache_bytes
from shardprep_runtime.format.grid import Grid
from shardprep_runtime.shard.prefetch_command import parse_ranks, parser, ranks_of_node

ROOT = Path(__file__).parents[2]
K8S = ROOT / "manifests/k8s"
RAY = ROOT / "manifests/ray"
FILES = sorted([*K8S.glob("*.yaml"), *RAY.glob("*.yaml")])
SCHEMAS = ROOT / "tests/data/schemas"
DOCKERFILE = ROOT / "manifests/docker/Dockerfile"

VERSIONS = ("1.35", "1.37")
"""Of Kubernetes: the oldest that has image volumes without a switch, and the newest."""

VLLM = json.loads((ROOT / "tests/data/vllm-serve-flags.json").read_text())

SET_BY_LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader.example"}
"""What the LeaderWorkerSet controller puts into the environment of every container of a group's pods."""


# ------------------------------------------------------------------------------------------------------------- reading
class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which kubectl would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: {twice} twice"
        return super().construct_mapping(node, deep)


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.load_all(path.read_text(), StrictLoader) if found is not None]


def objects(*folders: Path) -> list[dict[str, Any]]:
    """Of Kubernetes, from all files."""
    found = [each for path in FILES if path.parent in (folders or (K8S, RAY)) for each in documents(path)]
    return [each for each in found if "apiVersion" in each]


def named(item: Mapping[str, Any]) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [item for item in objects() if item["kind"] == kind]


@dataclass(frozen=True)
class Pod:
    """A template of pods in one of the objects."""

    where: str
    kind: str
    namespace: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> dict[str, Any]:
        return next(each for each in self.containers if each["name"] == name)

    def user(self, container: Mapping[str, Any], field: str) -> Any:
        own = container.get("securityContext", {})
        return own.get(field, self.spec.get("securityContext", {}).get(field))


def pods(*folders: Path) -> list[Pod]:
    found = []
    for item in objects(*folders):
        spec = item.get("spec", {})
        if item["kind"] == "Deployment":
            templates = {"": spec["template"]}
        elif item["kind"] == "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            templates = {" leader": group["leaderTemplate"], " worker": group["workerTemplate"]}
        elif item["kind"] in ("RayCluster", "RayService"):
            cluster = spec.get("rayClusterConfig", spec)
            templates = {" head": cluster["headGroupSpec"]["template"]}
            templates |= {
                f" {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]
            }
        else:
            continue
        for role, template in templates.items():
            labels = template.get("metadata", {}).get("labels", {})
            where = named(item) + role
            found.append(Pod(where, item["kind"], item["metadata"]["namespace"], labels, template["spec"]))
    return found


def args_of(pod: Pod, container: Mapping[str, Any]) -> list[str]:
    """The command line as kubelet makes it: variables replaced, each of which somebody must set."""
    known = {each["name"]: each.get("value", "1") for each in container.get("env", [])}
    if pod.kind == "LeaderWorkerSet":
        known |= SET_BY_LWS

    def value(found: re.Match[str]) -> str:
        assert found[1] in known, f"{pod.where}: nobody sets {found[1]}"
        return known[found[1]]

    given = [*container.get("command", []), *container.get("args", [])]
    return [re.sub(r"\$\((\w+)\)", value, each) for each in given]


ALL = [pytest.param(item, id=named(item)) for item in objects()]
PODS = [pytest.param(pod, id=pod.where) for pod in pods()]
OURS = [pytest.param(pod, id=pod.where) for pod in pods(K8S)]
ENGINES = [param for param in OURS if any(each["name"] == "engine" for each in param.values[0].containers)]
PREFETCHED = [
    param for param in OURS if any(each["name"] == "prefetch" for each in param.values[0].containers)
]


def test_every_kind_of_example_is_there() -> None:
    kinds = {item["kind"] for item in objects(K8S)}
    assert kinds >= {
        "Deployment", "Service", "LeaderWorkerSet", "PodDisruptionBudget", "NodePool", "EC2NodeClass", "PodMonitor",
    }  # fmt: skip
    assert "RayService" in {item["kind"] for item in objects(RAY)}
    assert any("image" in volume for pod in pods(K8S) for volume in pod.spec["volumes"])
    assert len(ENGINES) == 4
    assert len(PREFETCHED) == 3


# ------------------------------------------------------------------------------------------------------------- schemas
@cache
def published() -> dict[str, Any]:
    """The schemas of kinds that are not Kubernetes' own, by apiVersion and kind."""
    found = [json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")]
    return {
        f"{each['properties']['apiVersion']['const']} {each['properties']['kind']['const']}": each
        for each in found
    }


@cache
def core(version: str) -> Registry[Any]:
    folder = resources.files(kubernetes_validate) / f"kubernetes-json-schema/v{version}.0-local-strict"
    return Resource.from_contents(json.loads((folder / "_definitions.json").read_text())) @ Registry()


def validate(item: dict[str, Any], version: str) -> None:
    schema = published().get(f"{item['apiVersion']} {item['kind']}")
    if schema is None:
        kubernetes_validate.validate(item, version, strict=True)
    else:
        jsonschema.Draft202012Validator(schema, registry=core(version)).validate(item)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("item", ALL)
def test_an_object_is_what_its_published_schema_allows(item: dict[str, Any], version: str) -> None:
    validate(item, version)


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_a_schema_is_one_and_says_of_what_version(path: Path) -> None:
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert re.search(r"v\d+\.\d+|[0-9a-f]{7} \(\d{4}-\d\d-\d\d\)", schema["$comment"])

    def closed(part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, dict):
            if "properties" in part and isinstance(part.get("type"), str):
                yield part
            for each in part.values():
                yield from closed(each)

    assert all(part.get("additionalProperties") is False for part in closed(schema))


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("Deployment", "spec/template/spec/containers/0/startupProb", {}, "startupProb"),
        ("Deployment", "spec/template/spec/volumes/0/hostPath/type", 1, "1 is not"),
        ("PodDisruptionBudget", "spec/minAvailble", 1, "minAvailble"),
        ("LeaderWorkerSet", "spec/leaderWorkerTemplate/restartPolicy", "Always", "Always"),
        ("LeaderWorkerSet", "spec/leaderWorkerTemplate/groupSize", 2, "groupSize"),
        ("LeaderWorkerSet", "spec/leaderWorkerTemplate/workerTemplate/spec/volume", [], "volume"),
        ("NodePool", "spec/disruption/consolidateAfter", "30 minutes", "30 minutes"),
        ("NodePool", "spec/template/spec/requirements/0/operator", "Is", "Is"),
        ("EC2NodeClass", "spec/instanceStorePolicy", "RAID1", "RAID1"),
        ("EC2NodeClass", "spec/amiSelectorTerms", [], "should be non-empty"),
        ("PodMonitor", "spec/podMetricsEndpoints/0/interval", "15 s", "15 s"),
        ("RayService", "spec/rayClusterConfig/workerGroupSpecs/0/template/spec/container", [], "container"),
    ],
)
def test_a_field_that_does_not_exist_or_fit_is_refused(kind: str, path: str, value: Any, words: str) -> None:
    item = copy.deepcopy(of_kind(kind)[0])
    *above, last = path.split("/")
    part: Any = item
    for step in above:
        part = part[int(step) if isinstance(part, list) else step]
    part[last] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(words)):
        validate(item, VERSIONS[-1])


def test_a_key_that_is_written_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="twice"):
        yaml.load("a: 1\na: 2\n", StrictLoader)


# --------------------------------------------------------------------------------------------------------------- flags
def check_vllm_flags(given: list[str]) -> None:
    """Each option is one of vLLM's, with as many values as it takes, of its choices where it has them."""
    rest = list(given)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        assert name.startswith("-"), f"{name} is no option"
        assert name in VLLM["flags"], f"{VLLM['vllm']} has no option {name}"
        flag = VLLM["flags"][name]
        if flag["takes"] == "none":
            assert not equals, f"{name} takes no value"
            continue
        if not equals:
            assert rest and not rest[0].startswith("-"), f"{name} takes a value"
            value = rest.pop(0)
        if "choices" in flag and flag["takes"] == "one":
            assert value in flag["choices"], f"{name} {value}"


def serve_flags(args: list[str]) -> list[str]:
    """Of `shardprep vllm SOURCE ... -- FLAGS` or `vllm serve MODEL FLAGS`."""
    return args[args.index("--") + 1 :] if args[0] == "shardprep" else args[3:]


def test_the_recorded_flags_are_those_of_the_image() -> None:
    assert VLLM["vllm"].split()[1] == dockerfile_arg("VLLM").removeprefix("v")
    assert len(VLLM["flags"]) > 300


@pytest.mark.parametrize(
    "given",
    [
        ["--no-such-flag=1"],
        ["--headless=1"],
        ["--port"],
        ["--dtype=float9"],
        ["llama"],
        ["--port", "--headless"],
    ],
)
def test_a_flag_that_vllm_would_refuse_is_refused(given: list[str]) -> None:
    with pytest.raises(AssertionError):
        check_vllm_flags(given)


def shardprep_options(args: list[str]) -> dict[str, Any]:
    """What click makes of `shardprep vllm ...`, which refuses what it does not know."""
    context = click.Context(shardprep, info_name="shardprep")
    command = shardprep.get_command(context, args[1])
    assert command is not None
    with command.make_context(args[1], list(args[2:]), parent=context) as parsed:
        return dict(parsed.params)


@pytest.mark.parametrize("pod", ENGINES)
def test_the_engine_is_started_with_flags_that_exist(pod: Pod) -> None:
    args = args_of(pod, pod.container("engine"))
    check_vllm_flags(serve_flags(args))
    if args[0] == "shardprep":
        found = shardprep_options(args)
        assert list(found["arguments"]) == serve_flags(args)
        assert found["verify"] == "blocks"
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", found["manifest_digest"])
    else:
        assert args[:2] == ["vllm", "serve"]
        mounts = {each["mountPath"] for each in pod.container("engine")["volumeMounts"]}
        assert args[2] in mounts
        assert "--load-format=shardprep" in args
        extra = next(
            each.partition("=")[2] for each in args if each.startswith("--model-loader-extra-config=")
        )
        assert json.loads(extra)["verify"] == "blocks"


@pytest.mark.parametrize("pod", PREFETCHED)
def test_the_prefetch_brings_exactly_what_the_engine_of_its_pod_will_load(pod: Pod) -> None:
    container = pod.container("prefetch")
    assert "command" not in container  # the image's entrypoint
    found = parser().parse_args(args_of(pod, container))
    engine = args_of(pod, pod.container("engine"))
    options = shardprep_options(engine)
    sizes = read_sizes(serve_flags(engine))
    assert options["no_prefetch"]
    assert found.engine == "vllm"
    assert (found.source, found.revision, found.manifest_digest) == (
        str(options["source"]),
        options["revision"],
        options["manifest_digest"],
    )
    assert found.tensor_parallel_size == sizes.tensor_parallel_size
    assert (found.pipeline_parallel_size or 1) == sizes.pipeline_parallel_size
    assert (found.expert_parallel_size > 1) == sizes.expert_parallel
    grid = Grid(sizes.tensor_parallel_size, sizes.pipeline_parallel_size)
    if found.ranks is not None:
        ranks = parse_ranks(found.ranks)
        assert sizes.nnodes == 1
    else:
        ranks = ranks_of_node(grid, found.nnodes, found.node_rank)
    assert ranks == ranks_of_node(grid, sizes.nnodes, sizes.node_rank)
    gpus = int(pod.container("engine")["resources"]["limits"]["nvidia.com/gpu"])
    assert len(ranks) == gpus
    # a sidecar must stay, an init container must end
    assert found.stay == (container.get("restartPolicy") == "Always")


def test_a_group_of_hosts_runs_each_rank_once_and_only_its_leader_listens() -> None:
    (item,) = of_kind("LeaderWorkerSet")
    leader, worker = (pod for pod in pods(K8S) if pod.kind == "LeaderWorkerSet")
    flags = {each.where: serve_flags(args_of(each, each.container("engine"))) for each in (leader, worker)}
    sizes = read_sizes(flags[leader.where])
    assert SET_BY_LWS["LWS_GROUP_SIZE"] == str(item["spec"]["leaderWorkerTemplate"]["size"])
    assert sizes.nnodes == item["spec"]["leaderWorkerTemplate"]["size"]
    of_worker = {each.partition("=")[0] for each in flags[worker.where]}
    of_leader = {each.partition("=")[0] for each in flags[leader.where]}
    assert "--headless" in of_worker - of_leader
    assert of_leader - of_worker == {"--served-model-name", "--port"}
    shared = [each for each in flags[leader.where] if each in flags[worker.where]]
    assert len(shared) == len(of_leader & of_worker)
    assert not {"startupProbe", "readinessProbe", "livenessProbe", "ports"} & set(worker.container("engine"))


@pytest.mark.parametrize("path", sorted(RAY.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_serve_config_names_code_and_engine_arguments_that_exist(path: Path) -> None:
    configs = [each for each in documents(path) if "applications" in each]
    configs += [
        yaml.load(each["spec"]["serveConfigV2"], StrictLoader)
        for each in documents(path)
        if each.get("kind") == "RayService"
    ]
    assert configs
    for application in (each for config in configs for each in config["applications"]):
        module, _, name = application["import_path"].partition(":")
        if module.startswith("shardprep_runtime."):
            source = (ROOT / "runtime" / module.replace(".", "/")).with_suffix(".py").read_text()
            assert re.search(rf"^def {name}\b", source, re.MULTILINE)
        for llm in application.get("args", {}).get("llm_configs", []):
            for key in llm["engine_kwargs"]:
                assert f"--{key.replace('_', '-')}" in VLLM["flags"], key
            assert llm["engine_kwargs"]["load_format"] == "shardprep"


# ------------------------------------------------------------------------------------------------ what belongs together
@pytest.mark.parametrize("pod", PODS)
def test_mounts_have_volumes_and_volumes_are_mounted(pod: Pod) -> None:
    volumes = {each["name"] for each in pod.spec.get("volumes", [])}
    mounted = {each["name"] for item in pod.containers for each in item.get("volumeMounts", [])}
    assert mounted == volumes
    for item in pod.containers:
        paths = [each["mountPath"] for each in item.get("volumeMounts", [])]
        assert len(paths) == len(set(paths))


@pytest.mark.parametrize("pod", PREFETCHED)
def test_the_engine_reads_the_cache_that_the_prefetch_fills(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name in ("prefetch", "engine"):
        container = pod.container(name)
        env = {each["name"]: each.get("value") for each in container["env"]}
        mount = next(each for each in container["volumeMounts"] if each["name"] == "cache")
        assert env["SHARDPREP_CACHE_DIR"] == mount["mountPath"]
        assert not mount.get("readOnly")
        monkeypatch.setenv("SHARDPREP_CACHE_SIZE", env["SHARDPREP_CACHE_SIZE"])
        seen.append((env["SHARDPREP_CACHE_DIR"], cache_bytes(), pod.user(container, "runAsUser")))
    assert seen[0] == seen[1]
    (volume,) = (each for each in pod.spec["volumes"] if each["name"] == "cache")
    # of the node, not of the pod: what a start fetched is there for the next
    assert volume["hostPath"]["path"].startswith("/mnt/k8s-disks/0/")
    owner = pod.container("own-cache")
    (uid,) = {each[2] for each in seen}
    assert owner["command"] == ["chown", f"{uid}:0", seen[0][0]]
    assert pod.spec["initContainers"].index(owner) < pod.spec["initContainers"].index(
        pod.container("prefetch")
    )


@pytest.mark.parametrize("pod", ENGINES)
def test_ranks_have_shared_memory_that_counts_as_the_containers(pod: Pod) -> None:
    engine = pod.container("engine")
    (mount,) = (each for each in engine["volumeMounts"] if each["mountPath"] == "/dev/shm")
    (volume,) = (each for each in pod.spec["volumes"] if each["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert quantity(volume["emptyDir"]["sizeLimit"]) <= quantity(engine["resources"]["limits"]["memory"]) / 4


def quantity(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)", text).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** ("KMGT".index(unit[0]) + 1)


@pytest.mark.parametrize("pod", [each for each in ENGINES if "worker" not in each.id])  # type: ignore[operator]
def test_probes_ask_the_model_on_the_port_that_it_listens_on(pod: Pod) -> None:
    engine = pod.container("engine")
    ports = {each["name"]: each["containerPort"] for each in engine["ports"]}
    flags = dict(each.partition("=")[::2] for each in serve_flags(args_of(pod, engine)))
    assert int(flags["--port"]) == ports["http"]
    start, ready, alive = (engine[name] for name in ("startupProbe", "readinessProbe", "livenessProbe"))
    script = Path(start["exec"]["command"][1])
    assert start["exec"]["command"] == ["python3", str(script), str(ports["http"])]
    (mount,) = (each for each in engine["volumeMounts"] if each["mountPath"] == str(script.parent))
    (volume,) = (each for each in pod.spec["volumes"] if each["name"] == mount["name"])
    (config,) = (
        each for each in of_kind("ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"]
    )
    assert config["metadata"]["namespace"] == pod.namespace
    assert script.name in config["data"]
    # a start may take an hour; nothing else is asked before it is over
    assert start["periodSeconds"] * start["failureThreshold"] >= 3600
    # its own time-out is longer than that of the question, so that the reason is in the pod's events
    assert start["timeoutSeconds"] > 2 * 25
    for probe in (ready, alive):
        assert probe["httpGet"] == {"path": "/health", "port": "http"}
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 120
    assert "tcpSocket" not in json.dumps(engine)


@pytest.mark.parametrize("service", [pytest.param(each, id=named(each)) for each in of_kind("Service")])
def test_a_service_reaches_pods_that_listen(service: dict[str, Any]) -> None:
    selector = service["spec"]["selector"].items()
    chosen = [pod for pod in pods() if selector <= pod.labels.items()]
    assert chosen
    for pod in chosen:
        assert pod.namespace == service["metadata"]["namespace"]
        ports = {each["name"] for item in pod.containers for each in item.get("ports", [])}
        assert {each["targetPort"] for each in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize(
    "item", [pytest.param(each, id=named(each)) for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor") for each in of_kind(kind)]
)  # fmt: skip
def test_a_selector_selects(item: dict[str, Any]) -> None:
    labels = item["spec"]["selector"]["matchLabels"].items()
    chosen = [pod for pod in pods() if labels <= pod.labels.items()]
    assert chosen
    assert {pod.namespace for pod in chosen} == {item["metadata"]["namespace"]}
    if item["kind"] == "Deployment":
        assert [pod.where for pod in chosen] == [named(item)]
    if item["kind"] == "PodMonitor":
        (endpoint,) = item["spec"]["podMetricsEndpoints"]
        scraped = [
            pod.where
            for pod in chosen
            for each in pod.containers
            for port in each.get("ports", [])
            if port["name"] == endpoint["port"]
        ]
        assert len(scraped) == 3


def test_pods_find_nodes() -> None:
    (pool,), (node_class,) = of_kind("NodePool"), of_kind("EC2NodeClass")
    reference = pool["spec"]["template"]["spec"]["nodeClassRef"]
    assert reference["name"] == node_class["metadata"]["name"]
    assert f"{reference['group']}/v1" == node_class["apiVersion"]
    assert node_class["spec"]["instanceStorePolicy"] == "RAID0"  # what is at /mnt/k8s-disks/0
    taints = {(each["key"], each["effect"]) for each in pool["spec"]["template"]["spec"]["taints"]}
    for pod in pods(K8S):
        tolerated = {(each["key"], each["effect"]) for each in pod.spec["tolerations"]}
        assert taints <= tolerated, pod.where


# ------------------------------------------------------------------------------------------------------------- security
@pytest.mark.parametrize("pod", OURS)
def test_nothing_runs_as_root_but_what_gives_the_cache_away(pod: Pod) -> None:
    for container in pod.containers:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"]["drop"] == ["ALL"]
        if container["name"] == "own-cache":
            assert own["capabilities"]["add"] == ["CHOWN"]
            assert pod.user(container, "runAsUser") == 0
        else:
            assert "add" not in own["capabilities"]
            assert pod.user(container, "runAsNonRoot") is True
            assert pod.user(container, "runAsUser") == image_user()
    assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)


@pytest.mark.parametrize("pod", OURS)
def test_what_a_read_only_container_writes_to_is_mounted(pod: Pod) -> None:
    engine = pod.container("engine")
    paths = {each["mountPath"] for each in engine["volumeMounts"] if not each.get("readOnly")}
    env = {each["name"]: each.get("value", "") for each in engine["env"]}
    assert {"/tmp", env["HOME"]} <= paths
    for arg in engine["args"]:
        if arg.startswith("--folder="):
            assert any(Path(arg.partition("=")[2]).is_relative_to(path) for path in paths)


@pytest.mark.parametrize("pod", PODS)
def test_no_key_lies_in_a_manifest(pod: Pod) -> None:
    names = {each["name"] for item in pod.containers for each in item.get("env", [])}
    assert not {name for name in names if re.search("SECRET|ACCESS_KEY|TOKEN|PASSWORD", name)}
    account = pod.spec.get("serviceAccountName")
    if account is not None:
        known = {
            (each["metadata"]["namespace"], each["metadata"]["name"]) for each in of_kind("ServiceAccount")
        }
        assert (pod.namespace, account) in known
    assert pod.spec["automountServiceAccountToken"] is False or pod.kind.startswith("Ray")


@pytest.mark.parametrize("pod", PODS)
def test_everything_has_limits(pod: Pod) -> None:
    for container in pod.containers:
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert "memory" in resources["limits"]
        gpus = [resources[each].get("nvidia.com/gpu") for each in ("requests", "limits")]
        assert gpus[0] == gpus[1]


# --------------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("pod", PODS)
def test_images_are_pinned_and_of_the_versions_that_are_here(pod: Pod) -> None:
    images = [each["image"] for each in pod.containers]
    images += [each["image"]["reference"] for each in pod.spec.get("volumes", []) if "image" in each]
    for image in images:
        name, _, digest = image.partition("@")
        _, _, tag = name.rpartition("/")[2].partition(":")
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest) or re.search(r"\d+\.\d+\.\d+", tag), image
        if "/shardprep/" in image:
            assert tag.endswith(__version__), image
        if name.rpartition("/")[2].startswith("vllm-openai:"):
            assert tag.startswith(dockerfile_arg("VLLM")), image


@cache
def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each of the Dockerfile's instructions."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def dockerfile_arg(name: str) -> str:
    return next(
        rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith(name)
    )


def image_user() -> int:
    """Whom both images run as."""
    (user,) = {rest for word, rest in instructions() if word == "USER"}
    return int(user.partition(":")[0])


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [(word, base)]
        elif found:
            found[name].append((word, rest))
    return found


def test_the_images_of_the_manifests_are_those_that_the_dockerfile_makes() -> None:
    made = set(re.findall(r"-t (registry\.example\.com/\S+)", DOCKERFILE.read_text()))
    targets = set(re.findall(r"--target (\S+)", DOCKERFILE.read_text()))
    assert targets <= set(stages())
    used = {each["image"] for pod in pods(K8S) for each in pod.containers}
    assert used == made
    for target in targets:
        assert ("USER", "2000:0") in stages()[target]


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for steps in stages().values():
        for word, rest in steps:
            if word != "COPY" or rest.startswith("--from"):
                continue
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert not ignored(source, patterns), source
    assert ignored("tests", patterns)
    assert ignored("shardprep/__pycache__", patterns)
    assert ignored(".git", patterns)


def ignored(path: str, patterns: list[str]) -> bool:
    """As Docker reads .dockerignore: the last pattern that matches a path, or what it lies in, decides."""
    verdict = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        above = [path, *map(str, Path(path).parents)][:-1] if "/" in path else [path]
        if any(
            fnmatch.fnmatch(each, wanted) or fnmatch.fnmatch(f"/{each}", wanted.removeprefix("*"))
            for each in above
        ):
            verdict = not pattern.startswith("!")
    return verdict


def requirements() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *extras["s3"]]
    return {re.split("[<>=]", each)[0].replace("_", "-"): each for each in every}


def installed(stage: str) -> set[str]:
    """What a stage installs from an index."""
    words = [word for kind, rest in stages()[stage] if kind == "RUN" for word in shlex.split(rest)]
    commands = " ".join(words).split("&&")
    return {
        word
        for each in commands
        if "pip install" in each and "--no-deps" not in each
        for word in each.split("install", 1)[1].split()
        if not word.startswith(("-", "/"))
    }


def test_the_images_have_what_the_package_asks_for() -> None:
    """The engine's: all that it requires, with its ranges, but numpy, which must stay as vLLM has it."""
    wanted = requirements()
    assert installed("vllm") == {each for name, each in wanted.items() if name != "numpy"}
    assert installed("environment") == {"blake3", "botocore"}
    pinned = (ROOT / "scripts/constraints.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in installed("environment"))


def test_the_runtimes_image_runs_a_command_that_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entrypoint,) = (rest for word, rest in stages()["runtime"] if word == "ENTRYPOINT")
    assert json.loads(entrypoint) == ["shardprep-prefetch"]
    assert set(json.loads(entrypoint)) <= set(scripts)


# ------------------------------------------------------------------------------------------------------------ the probe
class Engine(BaseHTTPRequestHandler):
    """An engine's port, in a state."""

    state = "answers"

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        if self.state == "starts":
            self.send_error(503)
        elif self.state == "hangs up":
            self.close_connection = True
        elif self.state == "wants a key" and self.headers.get("Authorization") != "Bearer secret":
            self.send_error(401)
        else:
            self.reply({"object": "list", "data": [{"id": "llama", "object": "model"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "llama"
        assert asked["max_tokens"] == 1
        if self.state == "is dead":
            self.send_error(500)
        elif self.state == "says nothing":
            self.reply({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}})
        elif self.state == "says other things":
            self.reply(["no", "completion"])
        else:
            self.reply({"choices": [{"text": " 4"}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}})

    def reply(self, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


@contextmanager
def engine(state: str) -> Iterator[int]:
    handler = type("Engine", (Engine,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """The script as kubelet mounts it."""
    (config,) = of_kind("ConfigMap")
    path = tmp_path / "model_answers.py"
    path.write_text(config["data"]["model_answers.py"])
    return path


def ask(probe: Path, port: int, **env: str) -> subprocess.CompletedProcess[str]:
    # a proxy in the environment is not for this
    env = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", **env}
    command = [sys.executable, "-I", str(probe), str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


def test_the_probe_is_content_once_the_model_has_completed_a_prompt(probe: Path) -> None:
    with engine("answers") as port:
        found = ask(probe, port)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_probe_shows_the_key_that_the_engine_was_given(probe: Path) -> None:
    with engine("wants a key") as port:
        assert ask(probe, port, VLLM_API_KEY="secret").returncode == 0
        assert "401" in ask(probe, port).stderr


@pytest.mark.parametrize("state", ["starts", "hangs up", "is dead", "says nothing", "says other things"])
def test_a_port_that_accepts_is_not_enough_for_the_probe(probe: Path, state: str) -> None:
    with engine(state) as port:
        found = ask(probe, port)
    assert found.returncode == 1
    assert "answer" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_port_that_nobody_listens_on_yet_is_no_failure_of_the_probe(probe: Path) -> None:
    with engine("answers") as port:
        pass
    found = ask(probe, port)
    assert found.returncode == 1
    assert "Connection refused" in found.stderr
