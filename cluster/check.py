"""Check the cluster files before they cost anything: `python cluster/check.py [FILE ...]`.

Nothing is contacted. What is wrong is printed, a line a finding, and so is what is still to be
edited; the exit code is 1 if there was any. The rules, and where they come from:

- KubeRay's objects: the fields of KubeRay 1.7.0 (`schema/`) and, for pods, those of the
  `kubernetes` package; what the operator refuses beyond them
  (ray-operator/controllers/ray/utils/validation.go); what the API server refuses in any pod.
- Kueue: what its webhook refuses (pkg/controller/jobs/rayjob/rayjob_webhook.go), and that the
  whole job fits the queue, since it would wait for ever.
- `ray up` files: Ray's own schema and validation; on AWS the shape of EC2's RunInstances
  (botocore), on GCP that of a Compute Engine instance (google-api-python-client).
- Ours: one pinned image with the Ray and Python that the package is tested with, a token, nothing
  that listens outside the cluster, no work on the head, no head on spot nodes, memory limits, room
  in /dev/shm for the object store, no root, nothing that stays behind.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from hts_ray.config import HtsConfig, NodesConfig, PoolConfig, load_config
from hts_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "cluster"

# What the files leave to the user.
PLACEHOLDERS = re.compile(r"\b(REGISTRY|BUCKET|PROJECT|ACCOUNT|FAMILY|ami-0{17})\b")
# Ray's share of a node's memory for its object store (ray_constants.py).
OBJECT_STORE_SHARE = 0.3
_RAY_KINDS = {"RayJob", "RayCluster"}
_CORE_KINDS = {"ServiceAccount", "PersistentVolumeClaim"}
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_ELASTIC = "kueue.x-k8s.io/elastic-job"
_MOST_GROUPS = 17  # Kueue 0.19 and 0.20: 18 pod sets, one of them the head's
# How a RayJob may end: its job, or its cluster.
_ENDS = (("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed"))
_SPOT_LABELS = {
    "cloud.google.com/gke-spot",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
}
_GPU = "nvidia.com/gpu"
# The settings of so many GPUs, by the one that says where they are.
_COUNTS = {
    "label.pool.nodes": "label.pool.max_size",
    "predict.pool.nodes": "predict.pool.max_size",
    "train.nodes": "train.num_workers",
}
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|)$")
_QUANTITIES = {"limits", "requests", "sizeLimit"}
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a volume of the pods

Document = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Check the given files, all of this folder by default; return the exit code."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    paths = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.yaml"))
    found = 0
    for path in paths:
        for line in [*file_problems(path), *left_to_edit(path)]:
            print(f"{path.name}: {line}")
            found += 1
    print(f"{len(paths)} files, {found} findings")
    return min(found, 1)


def file_problems(path: Path) -> list[str]:
    """Return what is wrong with a file of cluster configurations; nothing when all is well."""
    try:
        documents = load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return [str(error).replace("\n", " ")]
    return [problem for document in documents for problem in problems(document)]


def left_to_edit(path: Path) -> list[str]:
    """Return the lines of a file, comments aside, that still hold a placeholder."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        f"line {number}: {found[0]} is still to be edited"
        for number, line in enumerate(lines, 1)
        if not line.lstrip().startswith("#") and (found := PLACEHOLDERS.search(line))
    ]


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: a repeated key is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Document]:
    """Return the documents of a YAML text, none sharing parts with another.

    Raises yaml.YAMLError when it is not YAML or a key is repeated.
    """
    documents = yaml.load_all(text, _Loader)
    # Through JSON, so that every use of an anchor is a value of its own.
    return [json.loads(json.dumps(document)) for document in documents if document is not None]


def problems(document: Document) -> list[str]:
    """Return what is wrong with one document, whatever it describes."""
    if not isinstance(document, dict):
        return ["a document must be a mapping"]
    if "cluster_name" in document:
        return list(_launcher_problems(document))
    kind = document.get("kind")
    if kind in _RAY_KINDS:
        wrong = list(_field_problems(document, str(kind)))
        # Rules look at fields that the schema vouches for.
        return wrong or [*_ray_problems(document), *_job_problems(document)]
    if str(document.get("apiVersion")).startswith("kueue.x-k8s.io/"):
        return list(_queue_problems(document))
    if document.get("apiVersion") == "v1" and kind in _CORE_KINDS:
        return list(_field_problems(document, f"V1{kind}"))
    return [f"no rule knows what {document.get('apiVersion')} {kind} is"]


def _field_problems(document: Document, kind: str) -> Iterator[str]:
    """Yield what the API server would refuse: unknown fields, wrong types, missing ones."""
    try:
        definitions = _definitions()
    except ImportError:
        yield "its fields are not checked: pip install kubernetes"
        return
    yield from _schema_problems(document, kind, definitions)


def _schema_problems(value: Any, kind: str, definitions: Document) -> Iterator[str]:
    """Yield where a value differs from a definition of a JSON Schema."""
    schema = {"$ref": f"#/definitions/{kind}", "definitions": definitions}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        path = ".".join(str(part) for part in error.absolute_path)
        yield f"{path or kind}: {error.message[:200]}"


@functools.cache
def _definitions() -> dict[str, Any]:
    """Return the schemas of KubeRay's types and of what they use of Kubernetes'."""
    from kubernetes.client import models

    text = (FOLDER / "schema" / "kuberay-1.7.0.yaml").read_text(encoding="utf-8")
    definitions: dict[str, Any] = yaml.safe_load(text)["definitions"]
    used = re.findall(r"#/definitions/(V1\w+)", text)
    for name in sorted({*used, *(f"V1{kind}" for kind in _CORE_KINDS)}):
        schema = getattr(models, name).model_json_schema(ref_template="#/definitions/{model}")
        definitions |= schema.pop("$defs", {})
        definitions[name] = schema
    return {name: _as_sent(schema) for name, schema in definitions.items()}


def _as_sent(schema: Any) -> Any:
    """Make a schema of the package's Python objects one of the YAML that is sent.

    Fields that are None there are left out here, and quantities may be whole numbers.
    """
    if isinstance(schema, list):
        return [_as_sent(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        return _as_sent(choices[0])
    result = {name: _as_sent(value) for name, value in schema.items()}
    for name in _QUANTITIES & set(result.get("properties") or {}):
        inner = {"type": ["string", "integer"], "pattern": _QUANTITY.pattern}
        whole = name != "sizeLimit"
        result["properties"][name] = {"additionalProperties": inner} if whole else inner
    return result


def _ray_problems(document: Document) -> Iterator[str]:
    """Yield what is wrong with the cluster that a RayJob or RayCluster describes."""
    spec = document["spec"]
    cluster = spec if document["kind"] == "RayCluster" else spec.get("rayClusterSpec")
    if cluster is None:
        yield "spec.rayClusterSpec: a job needs a cluster of its own"
        return
    yield from _cluster_problems(cluster)
    yield from _head_problems(cluster["headGroupSpec"])
    autoscales = bool(cluster.get("enableInTreeAutoscaling"))
    for group in cluster.get("workerGroupSpecs", []):
        yield from _group_problems(group, autoscales)
    images = set()
    for name, pod in ray_pods(cluster):
        images.add(pod["containers"][0].get("image"))
        yield from (f"{name}: {problem}" for problem in _pod_problems(pod))
    if len(images) > 1:
        yield f"the pods have several images: {sorted(map(str, images))}"
    for image in images:
        yield from _image_problems(str(image), str(cluster.get("rayVersion")))


def ray_pods(cluster: Document) -> Iterator[tuple[str, Document]]:
    """Yield the names and pod specs of a cluster's head and worker groups."""
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]["spec"]


def _cluster_problems(cluster: Document) -> Iterator[str]:
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode: whoever reaches the cluster could run code; set token"
    if not cluster.get("rayVersion"):
        yield "rayVersion: the operator needs it for token authentication"
    options = cluster.get("autoscalerOptions") or {}
    if not cluster.get("enableInTreeAutoscaling"):
        if options:
            yield "autoscalerOptions: without effect unless enableInTreeAutoscaling is true"
        return
    if options.get("version") == "v2":
        for name, pod in ray_pods(cluster):
            if pod.get("restartPolicy", "Never") != "Never":
                yield f"{name}: restartPolicy must be Never with autoscaler v2"
    names = _environment(cluster["headGroupSpec"]["template"]["spec"]["containers"][0])
    if "version" in options and "RAY_enable_autoscaler_v2" in names:
        yield "head: RAY_enable_autoscaler_v2 and autoscalerOptions.version exclude each other"


def _head_problems(head: Document) -> Iterator[str]:
    if (head.get("resources") or {}).get("CPU") != "0":
        yield 'head: resources.CPU must be "0": tasks there compete with the driver'
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "head: its ports must not be published: ClusterIP, no ingress, kubectl port-forward"
    pod = head["template"]["spec"]
    if "RAY_REDIS_ADDRESS" in _environment(pod["containers"][0]):
        yield "head: RAY_REDIS_ADDRESS is refused: use gcsFaultToleranceOptions"
    affinity = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or [{}]:
        avoided = {
            rule["key"]
            for rule in term.get("matchExpressions", [])
            if rule["operator"] in {"DoesNotExist", "NotIn"}
        }
        if missing := _SPOT_LABELS - avoided:
            yield f"head: may land on a spot node: its affinity lacks {sorted(missing)}"


def _group_problems(group: Document, autoscales: bool) -> Iterator[str]:
    name, replicas = group["groupName"], group.get("replicas", 0)
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", math.inf)
    if not low <= replicas <= high:
        yield f"{name}: replicas {replicas} is not within {low} and {high}"
    if autoscales and low:
        yield f"{name}: minReplicas {low} is paid for without work; autoscaling starts from 0"
    if autoscales and high == math.inf:
        yield f"{name}: maxReplicas: without it nothing limits the cost"
    if not autoscales and not low == replicas == high:
        yield f"{name}: without autoscaling minReplicas, replicas and maxReplicas must be equal"
    if group.get("suspend"):
        yield f"{name}: a suspended group needs a feature gate of the operator"


def _pod_problems(pod: Document) -> Iterator[str]:
    """Yield what is wrong with one pod: API server, memory, storage and rights."""
    for kind in ("containers", "volumes"):
        yield from _twice(kind, [item["name"] for item in pod.get(kind, [])])
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    user = pod.get("securityContext") or {}
    if not user.get("runAsNonRoot") or not user.get("runAsUser"):
        yield "securityContext: set runAsNonRoot, and runAsUser to the image's user"
    if not pod.get("serviceAccountName"):
        yield "serviceAccountName: without one the pod has the namespace's default rights"
    for toleration in pod.get("tolerations", []):
        if toleration.get("effect") not in {None, "NoSchedule", "PreferNoSchedule", "NoExecute"}:
            yield f"tolerations: there is no effect {toleration['effect']}"
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield "tolerations: Exists takes no value"
    for container in pod["containers"]:
        yield from _resource_problems(container)
        rights = container.get("securityContext") or {}
        if rights.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation must be false"
        mounts = container.get("volumeMounts", [])
        yield from _twice("mountPath", [mount["mountPath"] for mount in mounts])
        yield from _twice("env", [item["name"] for item in container.get("env", [])])
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{container['name']}: there is no volume {mount['name']}"
    yield from _storage_problems(pod["containers"][0], volumes)


def _resource_problems(container: Document) -> Iterator[str]:
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    name = container["name"]
    if "memory" not in limits:
        yield f"{name}: without a memory limit Ray takes the node's memory for its own"
    if "cpu" not in requests:
        yield f"{name}: without a CPU request Ray cannot tell its CPUs"
    for resource, limit in limits.items():
        request = quantity(requests.get(resource, limit))
        if request > quantity(limit):
            yield f"{name}: requests more {resource} than its limit"
        if resource in {_GPU, "memory"} and request != quantity(limit):
            yield f"{name}: {resource} must be the same in requests and limits"
    if _GPU in requests and _GPU not in limits:
        yield f"{name}: {_GPU} must be the same in requests and limits"


def _storage_problems(container: Document, volumes: Mapping[str, Document]) -> Iterator[str]:
    mounted = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    shared = (volumes.get(mounted.get(_SHARED_MEMORY, "")) or {}).get("emptyDir") or {}
    limit = quantity(((container.get("resources") or {}).get("limits") or {}).get("memory", 0))
    if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
        yield f"{_SHARED_MEMORY}: mount an emptyDir of medium Memory, or objects go to the disk"
    elif not OBJECT_STORE_SHARE * limit <= quantity(shared["sizeLimit"]) < limit:
        yield (
            f"{_SHARED_MEMORY}: {shared['sizeLimit']} must be less than the memory limit, against"
            f" which it counts, and {OBJECT_STORE_SHARE:.0%} of it or more, for the object store"
        )
    cache = _environment(container).get("HF_HOME", {}).get("value")
    if cache not in mounted:
        yield f"HF_HOME: {cache} is no mounted volume: models would fill the container's layer"


def _job_problems(document: Document) -> Iterator[str]:
    """Yield what is wrong with a RayJob beyond its cluster."""
    if document["kind"] != "RayJob":
        return
    spec, labels = document["spec"], document["metadata"].get("labels") or {}
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode" and ({"submitterConfig", "submitterPodTemplate"} & set(spec)):
        yield "submissionMode: SidecarMode has no submitter to configure"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "backoffLimit: InteractiveMode does not retry"
    yield from _deletion_problems(spec)
    if spec.get("activeDeadlineSeconds", 0) <= 0:
        yield "activeDeadlineSeconds: without it nothing limits the time that is paid for"
    if _QUEUE_LABEL in labels:
        yield from _kueue_problems(document)
    elif spec.get("suspend"):
        yield f"suspend: nothing would ever start it: no {_QUEUE_LABEL} label"
    yield from _entrypoint_problems(spec)


def _deletion_problems(spec: Document) -> Iterator[str]:
    """Yield what would leave a cluster behind, or what the operator refuses in deleting it."""
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules") or []
    if not rules:
        if not spec.get("shutdownAfterJobFinishes"):
            yield "shutdownAfterJobFinishes: must be true, or the cluster stays and is paid for"
        return
    if spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished"):
        yield "deletionStrategy: excludes shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    autoscaled = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    if autoscaled and any(rule["policy"] == "DeleteWorkers" for rule in rules):
        yield "deletionStrategy: DeleteWorkers is refused where the autoscaler is on"
    ends = {(key, rule["condition"].get(key)) for rule in rules for key in rule["condition"]
            if rule["policy"] in {"DeleteCluster", "DeleteSelf"}}  # fmt: skip
    for end in _ENDS:
        if end not in ends:
            yield f"deletionStrategy: after {end[0]} {end[1]} the cluster stays and is paid for"


def _kueue_problems(document: Document) -> Iterator[str]:
    spec = document["spec"]
    groups = spec["rayClusterSpec"].get("workerGroupSpecs", [])
    elastic = (document["metadata"].get("annotations") or {}).get(_ELASTIC) == "true"
    if spec["rayClusterSpec"].get("enableInTreeAutoscaling") and not elastic:
        yield f'enableInTreeAutoscaling: Kueue wants the annotation {_ELASTIC}: "true" for it'
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes: Kueue wants true, and so no deletionStrategy"
    if not spec.get("suspend"):
        yield "suspend: must be true, so that Kueue decides when it starts"
    if spec.get("clusterSelector"):
        yield "clusterSelector: Kueue admits jobs with a cluster of their own only"
    if len(groups) > _MOST_GROUPS:
        yield f"workerGroupSpecs: Kueue takes at most {_MOST_GROUPS}"
    if any(group["groupName"] == "head" for group in groups):
        yield "workerGroupSpecs: Kueue keeps the name head for itself"


def _entrypoint_problems(spec: Document) -> Iterator[str]:
    """Yield what the command asks for and the cluster does not offer: it would wait for ever."""
    words = shlex.split(spec.get("entrypoint") or "")
    if not words:
        yield "entrypoint: there is nothing to run"
    groups = (spec.get("rayClusterSpec") or {}).get("workerGroupSpecs", [])
    try:
        config = load_config(overrides=[word for word in words if re.match(r"[a-z_.]+=", word)])
    except ConfigError as error:
        yield f"entrypoint: {error}"
        return
    for name, nodes in _placings(config):
        taken = [group for group in groups if _takes(nodes, group)]
        if not taken:
            found = {str(group.get("labels", {})) for group in groups}
            yield (
                f"entrypoint: {name}.labels={nodes.labels}: no group of workers has these labels;"
                f" there are {', '.join(sorted(found))}"
            )
        offered = sum(
            group.get("maxReplicas", 0) * quantity(_limits(group["template"]["spec"]).get(_GPU, 0))
            for group in taken
        )
        count = _COUNTS.get(name, "")
        for word in words:
            if count and word.startswith(f"{count}=") and float(word.split("=")[1]) > offered:
                yield f"entrypoint: {word} is more than the cluster's {offered:g} GPUs"


def _placings(config: HtsConfig) -> Iterator[tuple[str, NodesConfig]]:
    """Yield every setting that says which nodes some work goes to."""
    for name in ("label.pool", "predict.pool", "score.pool", "train.features.pool"):
        pool: PoolConfig = functools.reduce(getattr, name.split("."), config)  # type: ignore
        yield f"{name}.nodes", pool.nodes
        yield f"{name}.decode_nodes", pool.decode_nodes
    yield "train.nodes", config.train.nodes
    yield "prepare.nodes", config.prepare.nodes
    yield "filter.nodes", config.filter.nodes
    yield "filter.nodes", config.filter.nodes


def _takes(nodes: NodesConfig, group: Document) -> bool:
    # The type of a pod's GPU is not told; what is asked for may be right.
    return nodes.take(group.get("labels") or {}, nodes.accelerator_type or "")


def gang_requests(document: Document) -> dict[str, float]:
    """Return what all pods of a RayJob of fixed size request together, the submitter left out."""
    cluster = document["spec"]["rayClusterSpec"]
    copies = {group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"]}
    total: dict[str, float] = {}
    for name, pod in ray_pods(cluster):
        for container in pod["containers"]:
            for resource, value in container["resources"]["requests"].items():
                total[resource] = total.get(resource, 0) + copies.get(name, 1) * quantity(value)
    return total


def _queue_problems(document: Document) -> Iterator[str]:
    """Yield what is wrong with Kueue's three kinds, as far as this folder uses them."""
    kind = str(document.get("kind"))
    text = (FOLDER / "schema" / "kueue.yaml").read_text(encoding="utf-8")
    definitions = yaml.safe_load(text)["definitions"]
    if kind not in definitions:
        yield f"no rule knows Kueue's {kind}"
        return
    wrong = list(_schema_problems(document, kind, definitions))
    yield from wrong
    spec = {} if wrong else document.get("spec") or {}
    for group in spec.get("resourceGroups", []):
        covered = group["coveredResources"]
        for flavor in group["flavors"]:
            names = [resource["name"] for resource in flavor["resources"]]
            if names != covered:
                yield f"{flavor['name']}: must have {covered} in this order, has {names}"


def _launcher_problems(config: Document) -> Iterator[str]:
    """Yield what is wrong with a `ray up` file."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # whatever Ray raises is a finding
        yield f"Ray refuses it: {' '.join(str(error).split())[:300] or type(error).__name__}"
        return
    provider = config["provider"]["type"]
    yield from _start_problems(config)
    yield from _token_problems(config)
    if "0.0.0.0" in json.dumps(config):  # noqa: S104 - what it looks for
        yield "0.0.0.0: nothing may listen outside the cluster"
    if provider == "local":
        return
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if config.get(name) != []:
            yield f"{name}: must be [], or Ray installs other versions than the image's"
    docker = config.get("docker") or {}
    yield from _image_problems(str(docker.get("image")), None)
    if {"head_image", "worker_image"} & set(docker):
        yield "docker: head and workers must have one image"
    if config["provider"].get("cache_stopped_nodes") is not False:
        yield "provider.cache_stopped_nodes: must be false: stopped nodes keep their paid disks"
    for name, node in config["available_node_types"].items():
        is_head = name == config.get("head_node_type")
        yield from (f"{name}: {problem}" for problem in _node_problems(node, is_head, provider))


def _start_problems(config: Document) -> Iterator[str]:
    head = " ".join(config.get("head_start_ray_commands", []))
    if "--dashboard-host=127.0.0.1" not in head:
        yield "head_start_ray_commands: the dashboard must stay on --dashboard-host=127.0.0.1"
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in head:
        yield "head_start_ray_commands: without --autoscaling-config no worker is ever started"


def _token_problems(config: Document) -> Iterator[str]:
    """Yield what keeps a node from asking for the token, or from knowing it."""
    mounts = config.get("file_mounts") or {}
    if not any(target.endswith("/.ray/auth_token") for target in mounts):
        yield "file_mounts: no node gets ~/.ray/auth_token"
    if "--env=RAY_AUTH_MODE=token" in (config.get("docker") or {}).get("run_options", []):
        return
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(name, []):
            if "ray start" in command and "RAY_AUTH_MODE=token" not in command:
                yield f"{name}: RAY_AUTH_MODE=token is missing: anyone could run code"


def _node_problems(node: Document, is_head: bool, provider: str) -> Iterator[str]:
    settings = node["node_config"]
    low, high = node.get("min_workers", 0), node.get("max_workers")
    if is_head and node["resources"].get("CPU") != 0:
        yield "resources.CPU must be 0: tasks there compete with the driver"
    if not is_head and (low or high is None):
        yield "min_workers must be 0 and max_workers given: what it costs idle, and at most"
    if high is not None and low > high:
        yield f"min_workers {low} is more than max_workers {high}"
    if provider == "aws":
        spot = (settings.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        if "IamInstanceProfile" not in settings:
            yield "IamInstanceProfile: without one Ray gives all rights, or none, on S3"
        yield from aws_problems(settings)
    else:
        scheduling = settings.get("scheduling")
        spot = isinstance(scheduling, dict) and scheduling.get("provisioningModel") == "SPOT"
        yield from gcp_problems(settings)
    if is_head and spot:
        yield "a head on a spot node takes the whole cluster with it"


def aws_problems(settings: Document) -> Iterator[str]:
    """Yield what EC2's RunInstances does not know in a node_config."""
    try:
        import botocore.validate

        shape = _run_instances()
    except ImportError:
        yield 'node_config is not checked: pip install "hts-ray[aws]"'
        return
    request = {"MinCount": 1, "MaxCount": 1, **settings}
    request.pop("SubnetIds", None)  # Ray's own: it tries one after the other
    report = botocore.validate.ParamValidator().validate(request, shape)
    yield from report.generate_report().splitlines()


@functools.cache
def _run_instances() -> Any:
    import botocore.session

    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def gcp_problems(settings: Document) -> Iterator[str]:
    """Yield what a Compute Engine instance does not know in a node_config."""
    try:
        definitions = _compute_definitions()
    except ImportError:
        yield 'node_config is not checked: pip install "hts-ray[gcp]"'
        return
    yield from _schema_problems(settings, "Instance", definitions)


@functools.cache
def _compute_definitions() -> Document:
    import googleapiclient.discovery_cache

    folder = Path(googleapiclient.discovery_cache.__file__).parent / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text(encoding="utf-8"))["schemas"]
    return {name: _from_discovery(schema) for name, schema in schemas.items()}


def _from_discovery(schema: Document) -> Document:
    """Make a schema of Google's discovery format a JSON Schema that refuses unknown fields."""
    if "$ref" in schema:
        return {"$ref": f"#/definitions/{schema['$ref']}"}
    result: Document = {name: schema[name] for name in ("type", "enum") if name in schema}
    if result["type"] == "any":
        return {}
    if schema.get("format") == "int64":  # a string in this format; whole numbers are taken too
        result["type"] = ["string", "integer"]
    if result["type"] == "object":
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        result["properties"] = {name: _from_discovery(inner) for name, inner in fields.items()}
        result["additionalProperties"] = _from_discovery(others) if others else False
    if "items" in schema:
        result["items"] = _from_discovery(schema["items"])
    return result


def _image_problems(image: str, ray_version: str | None) -> Iterator[str]:
    """Yield how an image differs from the one that `cluster/Dockerfile` makes."""
    wanted = image_tag()
    if image.rpartition(":")[2] != wanted:
        yield f"image: {image} must have the tag {wanted}: client and nodes need equal versions"
    if ray_version is not None and ray_version != versions()["ray"]:
        yield f"rayVersion: {ray_version} must be {versions()['ray']}"


def versions() -> dict[str, str]:
    """Return the package's version, the Ray that `constraints.txt` pins and the image's Python."""
    package = (ROOT / "hts_ray" / "__init__.py").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    base = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    found = {
        "package": re.search(r'__version__ = "(.+)"', package),
        "ray": re.search(r"^ray==([\d.]+)$", pinned, re.M),
        "python": re.search(r"^FROM \S+-py(\d)(\d+)$", base, re.M),
    }
    missing = [name for name, match in found.items() if match is None]
    assert not missing, f"no version of {missing}"
    return {name: ".".join(match.groups()) for name, match in found.items() if match}


def image_tag() -> str:
    """Return the tag that names all versions of the image."""
    found = versions()
    return f"{found['package']}-ray{found['ray']}-py{found['python'].replace('.', '')}"


def quantity(value: str | int) -> float:
    """Return a Kubernetes quantity ("500m", "24Gi", 1) as a number."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no quantity")
    number, unit = float(match[1]), match[2]
    if unit == "m":
        return number / 1000
    power = " kMGTP".index(unit[0].replace("K", "k")) if unit else 0
    return number * (1024.0 if unit.endswith("i") else 1000.0) ** power


def _limits(pod: Document) -> Document:
    return (pod["containers"][0].get("resources") or {}).get("limits") or {}


def _environment(container: Document) -> dict[str, Document]:
    return {item["name"]: item for item in container.get("env", [])}


def _twice(what: str, names: Sequence[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{what}: {name} is given twice"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
