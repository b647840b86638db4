"""The cluster files keep every rule, and every rule notices the fault that it is for."""

import json
import re
import shutil

import check
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

FILES = sorted(path.name for path in check.FOLDER.glob("*.yaml"))
DELETE = object()


def document(name, index=0):
    """Return one document of a cluster file, free to be changed."""
    return check.load((check.FOLDER / name).read_text())[index]


def change(value, path, new):
    """Set, or delete, what lies at a path of keys and indices joined by spaces."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split()]
    for key in parents:
        value = value[key]
    if new is DELETE:
        del value[last]
    else:
        value[last] = new


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_well(name):
    """Would catch a file that the cluster refuses, or that leaves costs or ports open."""
    assert check.file_problems(check.FOLDER / name) == []


CLUSTER = "spec rayClusterSpec"
HEAD, GROUP = f"{CLUSTER} headGroupSpec", f"{CLUSTER} workerGroupSpecs 0"
HEAD_POD, POD = f"{HEAD} template spec", f"{GROUP} template spec"
CONTAINER = f"{POD} containers 0"
TERM = (
    f"{HEAD_POD} affinity nodeAffinity requiredDuringSchedulingIgnoredDuringExecution"
    " nodeSelectorTerms 0 matchExpressions"
)
WITHOUT_GPU = {"requests": {"cpu": "7", "memory": "24Gi"}, "limits": {"memory": "24Gi"}}
RULES = "spec deletionStrategy deletionRules"
REDIS = [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]
AUTOSCALER_V2 = [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]


@pytest.mark.parametrize(
    ("path", "new", "words"),
    [
        # The custom resource's schema.
        ("spec entrypont", "hts label", "entrypont"),
        ("spec entrypoint", 1, "is not of type 'string'"),
        (f"{HEAD} resources CPU", 0, "is not of type 'string'"),
        (f"{HEAD} template", DELETE, "'template' is a required property"),
        (f"{HEAD} minReplicas", 1, "minReplicas"),
        (f"{GROUP} maxReplicas", "8", "is not of type 'integer'"),
        (f"{CLUSTER} authOptions mode", "basic", "is not one of"),
        (f"{CLUSTER} autoscalerOptions version", "v3", "is not one of"),
        (f"{CLUSTER} autoscalerOptions idleTimeoutSeconds", "120", "is not of type 'integer'"),
        (f"{CONTAINER} resources limits memory", "24GB", "does not match"),
        (f"{CONTAINER} env 0 value", 1, "is not of type 'string'"),
        (f"{CONTAINER} image_pull_policy", "Always", "'image_pull_policy' was unexpected"),
        (f"{CONTAINER} resources requests cpu", 0.5, "is not of type 'string', 'integer'"),
        (f"{CONTAINER} volumeMounts 0 mountPath", DELETE, "'mountPath' is a required"),
        (f"{CONTAINER} volumeMounts 0", "/dev/shm", "is not of type 'object'"),
        (f"{POD} containers", {}, "is not of type 'array'"),
        (f"{POD} securityContext runAsUser", True, "is not of type 'integer'"),
        ("metadata labels", ["hts"], "is not of type 'object'"),
        (f"{POD} nodeselector", {"pool": "gpu"}, "'nodeselector' was unexpected"),
        ("metadata name", "Hts", "metadata.name: 'Hts' does not match"),
        ("metadata name", "h" * 48, "is too long"),
        # The operator's rules for jobs.
        ("spec submissionMode", "K8sJob", "'K8sJob' is not one of"),
        ("spec submitterConfig", {"backoffLimit": 2}, "no submitter to configure"),
        ("spec submissionMode", "InteractiveMode", "does not retry"),
        ("spec deletionStrategy", DELETE, "stays and is paid for"),
        (f"{RULES} 1", DELETE, "after jobStatus FAILED the cluster stays"),
        (f"{RULES} 2 policy", "DeleteNone", "after jobDeploymentStatus Failed the cluster stays"),
        (f"{RULES} 0 policy", "DeleteWorkers", "refused where the autoscaler is on"),
        (f"{RULES} 0 condition ttlSeconds", -1, "less than the minimum of 0"),
        (f"{RULES} 0 condition jobStatus", "STOPPED", "is not one of"),
        ("spec ttlSecondsAfterFinished", 300, "excludes shutdownAfterJobFinishes"),
        ("spec activeDeadlineSeconds", DELETE, "nothing limits the time"),
        ("spec backoffLimit", -1, "less than the minimum of 0"),
        ("spec suspend", True, "nothing would ever start it"),
        ("spec rayClusterSpec", DELETE, "needs a cluster of its own"),
        ("spec entrypoint", "", "nothing to run"),
        ("spec entrypoint", "hts label label.pool.max_size=25", "than the cluster's 24 GPUs"),
        (
            "spec entrypoint",
            "hts label label.pool.max_size=17 'label.pool.nodes.labels={tier: large}'",
            "than the cluster's 16 GPUs",
        ),
        (
            "spec entrypoint",
            "hts label 'label.pool.decode_nodes.labels={tier: disk}'",
            "label.pool.decode_nodes.labels={'tier': 'disk'}: no group of workers has these labels;"
            " there are {'tier': 'cpu'}, {'tier': 'large'}, {'tier': 'small'}",
        ),
        ("spec entrypoint", "hts label 'label.pool.nodes.labels={tier: a b}'", "is no label"),
        (f"{GROUP} labels", {"tier": 1}, "is not of type 'string'"),
        # Its rules for clusters.
        (f"{CLUSTER} authOptions", DELETE, "set token"),
        (f"{CLUSTER} rayVersion", DELETE, "needs it for token authentication"),
        (f"{CLUSTER} rayVersion", "2.59.0", "rayVersion: 2.59.0 must be"),
        (f"{CLUSTER} enableInTreeAutoscaling", False, "without effect unless"),
        (f"{POD} restartPolicy", "Always", "must be Never with autoscaler v2"),
        (f"{HEAD_POD} containers 0 env", AUTOSCALER_V2, "exclude each other"),
        (f"{HEAD_POD} containers 0 env", REDIS, "use gcsFaultToleranceOptions"),
        (f"{GROUP} replicas", 9, "not within 0 and 8"),
        (f"{GROUP} minReplicas", 1, "paid for without work"),
        (f"{GROUP} maxReplicas", DELETE, "nothing limits the cost"),
        (f"{GROUP} suspend", True, "feature gate"),
        # Ours.
        (f"{HEAD} resources CPU", "4", "compete with the driver"),
        (f"{HEAD} serviceType", "LoadBalancer", "must not be published"),
        (f"{HEAD} enableIngress", True, "must not be published"),
        (f"{HEAD_POD} affinity", DELETE, "may land on a spot node"),
        (f"{TERM} 1 operator", "In", "eks.amazonaws.com/capacityType"),
        (f"{CONTAINER} image", "REGISTRY/hts-ray:latest", "must have the tag"),
        (f"{CONTAINER} image", "REGISTRY/hts-ray:other", "several images"),
        # Any pod's rules.
        (f"{CONTAINER} resources limits memory", DELETE, "node's memory for its own"),
        (f"{CONTAINER} resources requests cpu", DELETE, "without a CPU request"),
        (f"{CONTAINER} resources limits memory", "16Gi", "more memory than its limit"),
        (f"{CONTAINER} resources limits nvidia.com/gpu", 2, "must be the same"),
        (f"{CONTAINER} resources limits nvidia.com/gpu", DELETE, "must be the same"),
        (f"{CONTAINER} volumeMounts 0 name", "shn", "no volume shn"),
        (f"{CONTAINER} volumeMounts 1 mountPath", "/dev/shm", "mountPath: /dev/shm is given twice"),
        (f"{CONTAINER} volumeMounts", [], "/dev/shm: mount an emptyDir"),
        (f"{POD} volumes 0 emptyDir medium", DELETE, "/dev/shm: mount an emptyDir"),
        (f"{POD} volumes 0 emptyDir sizeLimit", "7Gi", "/dev/shm: 7Gi must be"),
        (f"{POD} volumes 0 emptyDir sizeLimit", "24Gi", "/dev/shm: 24Gi must be"),
        (f"{POD} volumes 1 name", "shm", "volumes: shm is given twice"),
        (f"{CONTAINER} env 0 value", "/models", "HF_HOME: /models is no mounted volume"),
        (f"{CONTAINER} env 1 name", "HF_HOME", "env: HF_HOME is given twice"),
        (f"{POD} tolerations 0 effect", "NoSchedules", "no effect NoSchedules"),
        (f"{POD} tolerations 0 value", "present", "Exists takes no value"),
        (f"{POD} securityContext runAsNonRoot", False, "set runAsNonRoot"),
        (f"{POD} serviceAccountName", DELETE, "namespace's default rights"),
        (f"{CONTAINER} securityContext", DELETE, "allowPrivilegeEscalation must be false"),
    ],
)
def test_a_fault_in_the_job_is_noticed(path, new, words):
    """Would catch a rule that looks at the wrong place, or at nothing."""
    job = document("kuberay-pipeline.yaml")
    change(job, path, new)
    assert words in "\n".join(check.problems(job))


@pytest.mark.parametrize(
    ("path", "new", "words"),
    [
        ("metadata labels", DELETE, "nothing would ever start it"),
        ("spec suspend", False, "so that Kueue decides"),
        ("spec clusterSelector", {"ray.io/cluster": "hts"}, "a cluster of their own only"),
        (f"{CLUSTER} enableInTreeAutoscaling", True, "wants the annotation"),
        ("spec shutdownAfterJobFinishes", False, "Kueue wants true"),
        (f"{GROUP} groupName", "head", "keeps the name head"),
        (f"{CONTAINER} resources", WITHOUT_GPU, "more than the cluster's 0 GPUs"),
        (f"{GROUP} maxReplicas", 5, "must be equal"),
        ("spec entrypoint", "hts train train.num_workers=5", "more than the cluster's 4 GPUs"),
    ],
)
def test_a_fault_in_the_gang_is_noticed(path, new, words):
    """Would catch a job that Kueue refuses or never starts."""
    job = document("kuberay-train.yaml")
    change(job, path, new)
    assert words in "\n".join(check.problems(job))


def test_an_elastic_job_may_be_autoscaled_under_kueue():
    """Would catch a check that refuses what Kueue takes."""
    job = document("kuberay-train.yaml")
    change(job, f"{CLUSTER} enableInTreeAutoscaling", True)
    change(job, f"{GROUP} minReplicas", 0)
    change(job, "metadata annotations", {"kueue.x-k8s.io/elastic-job": "true"})
    assert check.problems(job) == []


def test_too_many_groups_for_kueue_are_noticed():
    """Would catch a limit that is off by one."""
    job = document("kuberay-train.yaml")
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups.extend({**groups[0], "groupName": f"gpu-{number}"} for number in range(16))
    assert check.problems(job) == []
    groups.append({**groups[0], "groupName": "one-more"})
    assert check.problems(job) == ["workerGroupSpecs: Kueue takes at most 17"]


def test_the_gang_fits_its_queue_and_fills_its_gpus():
    """Would catch a quota below the job's requests: Kueue would keep it waiting for ever."""
    job = document("kuberay-train.yaml")
    _, cluster_queue, local_queue = check.load((check.FOLDER / "kuberay-queue.yaml").read_text())
    flavor = cluster_queue["spec"]["resourceGroups"][0]["flavors"][0]
    quota = {item["name"]: check.quantity(item["nominalQuota"]) for item in flavor["resources"]}
    requested = check.gang_requests(job)
    # The operator's submitter, which Kueue counts too (KubeRay 1.7, constant.go).
    submitter = {"cpu": 0.5, "memory": check.quantity("200Mi")}
    assert set(requested) == set(quota)
    for name, value in requested.items():
        assert value + submitter.get(name, 0) <= quota[name], name
    assert requested["nvidia.com/gpu"] == quota["nvidia.com/gpu"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local_queue["metadata"]["name"]
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]


@pytest.mark.parametrize(
    ("index", "path", "new", "words"),
    [
        (0, "kind", "Cohort", "no rule knows"),
        (1, "spec resourceGroup", [], "'resourceGroup' was unexpected"),
        (1, "spec resourceGroups 0 coveredResources", ["cpu"], "in this order"),
        (2, "spec clusterQueue", DELETE, "'clusterQueue' is a required property"),
    ],
)
def test_a_fault_in_the_queue_is_noticed(index, path, new, words):
    """Would catch a queue that Kueue refuses."""
    queue = document("kuberay-queue.yaml", index)
    change(queue, path, new)
    assert words in "\n".join(check.problems(queue))


NODES = "available_node_types"


@pytest.mark.parametrize(
    ("name", "path", "new", "words"),
    [
        # Ray's schema and validation.
        ("aws.yaml", "max_worker", 8, "max_worker"),
        ("aws.yaml", "head_node_type", "heads", "head_node_type"),
        ("aws.yaml", f"{NODES} gpu resources GPU", "1", "is not of type 'integer'"),
        ("aws.yaml", f"{NODES} gpu node_conf", {}, "node_conf"),
        ("aws.yaml", "docker container_name", DELETE, "container & image name"),
        ("local.yaml", "provider worker_ips", DELETE, "Ray refuses it"),
        ("local.yaml", f"{NODES}", {"head": {}}, "Ray refuses it"),
        # EC2's and Compute Engine's shapes.
        ("aws.yaml", f"{NODES} gpu node_config InstanceTypes", "g5.2xlarge", "InstanceTypes"),
        ("aws.yaml", f"{NODES} gpu node_config BlockDeviceMappings 0 Ebs Size", 9, "Size"),
        ("aws.yaml", f"{NODES} head node_config ImageId", 1, "ImageId"),
        (
            "gcp.yaml",
            f"{NODES} gpu node_config machine_type",
            "g2",
            "'machine_type' was unexpected",
        ),
        ("gcp.yaml", f"{NODES} gpu node_config scheduling", [{}], "is not of type 'object'"),
        ("gcp.yaml", f"{NODES} gpu node_config disks", {}, "is not of type 'array'"),
        ("gcp.yaml", f"{NODES} gpu node_config disks 0 boot", "yes", "is not of type 'boolean'"),
        (
            "gcp.yaml",
            f"{NODES} gpu node_config scheduling provisioningModel",
            "SPOTTY",
            "is not one of",
        ),
        # Ours.
        ("aws.yaml", f"{NODES} gpu node_config IamInstanceProfile", DELETE, "all rights, or none"),
        ("aws.yaml", f"{NODES} head resources", {}, "compete with the driver"),
        ("aws.yaml", f"{NODES} gpu min_workers", 1, "what it costs idle"),
        ("aws.yaml", f"{NODES} gpu max_workers", DELETE, "at most"),
        ("aws.yaml", f"{NODES} head max_workers", -1, "is more than max_workers"),
        ("aws.yaml", "docker image", "rayproject/ray:latest", "must have the tag"),
        ("aws.yaml", "docker worker_image", "rayproject/ray:2.60.0", "must have one image"),
        ("aws.yaml", "setup_commands", DELETE, "setup_commands: must be []"),
        ("gcp.yaml", "head_setup_commands", DELETE, "head_setup_commands: must be []"),
        ("gcp.yaml", "provider cache_stopped_nodes", DELETE, "paid disks"),
        ("gcp.yaml", "file_mounts", {}, "no node gets ~/.ray/auth_token"),
        ("gcp.yaml", "docker run_options", [], "RAY_AUTH_MODE=token is missing"),
        ("gcp.yaml", "docker run_options 0", "--publish=0.0.0.0:8265:8265", "0.0.0.0"),
        ("local.yaml", "head_start_ray_commands 1", "ray start --head", "dashboard must stay"),
        ("local.yaml", "head_start_ray_commands 1", "ray start --head", "--autoscaling-config"),
        ("local.yaml", "worker_start_ray_commands 1", "ray start", "worker_start_ray_commands"),
    ],
)
def test_a_fault_in_a_launcher_file_is_noticed(name, path, new, words):
    """Would catch a file that `ray up` or the cloud refuses, or that opens what must be closed."""
    config = document(name)
    change(config, path, new)
    assert words in "\n".join(check.problems(config))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("aws.yaml", "InstanceMarketOptions", {"MarketType": "spot"}),
        ("gcp.yaml", "scheduling", {"provisioningModel": "SPOT"}),
    ],
)
def test_a_head_on_spot_is_noticed(name, key, value):
    """Would catch a head that goes with its node and takes every job with it."""
    config = document(name)
    gpu = config[NODES]["gpu"]["node_config"][key]
    assert value.items() <= gpu.items()  # the GPUs are on spot
    config[NODES]["head"]["node_config"][key] = value
    assert "takes the whole cluster" in "\n".join(check.problems(config))


def test_the_examples_of_the_readme_are_well():
    """Would catch a volume claim or a policy that is refused when it is copied."""
    readme = (check.FOLDER / "README.md").read_text()
    blocks = dict(re.findall(r"^```(json|yaml)\n(.*?)^```$", readme, re.M | re.S))
    (claim,) = check.load(blocks["yaml"])
    assert check.problems(claim) == []
    change(claim, "spec accessModes", "ReadWriteMany")
    assert "is not of type 'array'" in check.problems(claim)[0]
    actions = [statement["Action"] for statement in json.loads(blocks["json"])["Statement"]]
    assert not [action for action in actions if "*" in action]


def test_what_nobody_knows_is_a_finding():
    """Would catch a file that passes because no rule is for it."""
    account = document("kuberay-setup.yaml")
    account["spec"] = {}
    assert "'spec' was unexpected" in check.problems(account)[0]
    assert check.problems({"apiVersion": "v1", "kind": "Pot"}) == ["no rule knows what v1 Pot is"]


def test_a_key_that_is_given_twice_is_refused():
    """Would catch YAML's habit of taking the last of two values in silence."""
    with pytest.raises(yaml.YAMLError, match="'b' is given twice"):
        check.load("a: {b: 1, b: 2}")


def test_the_command_names_what_is_left_to_edit(tmp_path, capsys):
    """Would catch placeholders that reach the cluster, or an edited file that is refused."""
    path = tmp_path / "kuberay-interactive.yaml"
    shutil.copy(check.FOLDER / path.name, path)
    assert check.main([str(path)]) == 1
    assert "REGISTRY is still to be edited" in capsys.readouterr().out
    path.write_text(path.read_text().replace("REGISTRY", "registry.example/team"))
    assert check.main([str(path)]) == 0
    assert "0 findings" in capsys.readouterr().out
    path.write_text("kind: [")
    assert check.main([str(path)]) == 1


def test_the_files_say_where_to_edit():
    """Would catch a placeholder without the mark that users search for, far from any."""
    for name in FILES:
        lines = (check.FOLDER / name).read_text().splitlines()
        for number, line in enumerate(lines):
            if check.PLACEHOLDERS.search(line) and not line.startswith("#"):
                near = "\n".join(lines[max(0, number - 5) : number + 1])
                assert "EDIT" in near, f"{name}: {line}"


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_quantities_are_those_of_kubernetes(whole, milli):
    """Would catch decimal taken for binary units, or thousandths for millions."""
    assert check.quantity(whole) == check.quantity(str(whole)) == whole
    assert check.quantity(f"{milli}m") == pytest.approx(milli / 1000)
    assert check.quantity(f"{whole}Mi") == whole * 2**20
    assert check.quantity(f"{whole}G") == whole * 10**9
    assert check.quantity(f"{whole}Gi") == whole * 2**30


@pytest.mark.parametrize("text", ["", "Gi", "1GB", "1 Gi", "-1", "1g"])
def test_what_is_no_quantity_is_refused(text):
    """Would catch a unit that Kubernetes does not know."""
    with pytest.raises(ValueError, match="is no quantity"):
        check.quantity(text)
