"""Runs on object storage, against a real S3 server and one with faults."""

import io
import time

import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from servers import BUCKET, Fault, faulty_store

from hts_ray import cli
from hts_ray.config import ImagesConfig
from hts_ray.engine import compaction
from hts_ray.engine.compaction import BLOCKS, CHECKPOINT
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.image_pass import finish
from hts_ray.errors import DataError
from hts_ray.images import retry as images
from hts_ray.images.folder import read_folder
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage
from hts_ray.store.tables import read_table, write_table


@pytest.fixture
def store(s3, monkeypatch):
    """A proxy with faults in front of the server, named by the environment."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.01)
    with faulty_store(s3["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_files_behave_as_local_ones_do(store):
    """Would catch a path that works on a disk only."""
    root = f"s3://{BUCKET}/files"
    assert not storage.exists(root)
    assert storage.list_names(root) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/none")
    storage.write_json(f"{root}/a/x y.json", {"x": 1})
    storage.write_json(f"{root}/a/x y.json", {"x": 2})
    assert storage.read_json(f"{root}/a/x%20y.json") == {"x": 2}
    assert storage.list_names(f"{root}/a") == ["x y.json"]
    assert storage.list_names(root) == ["a"]
    assert storage.exists(f"{root}/a")
    storage.write_bytes(f"{root}/large", b"0" * (12 << 20))  # more than one part
    assert len(storage.read_bytes(f"{root}/large")) == 12 << 20
    storage.remove_tree(root)
    assert not storage.exists(f"{root}/a/x y.json")


def test_a_small_file_is_one_request(store):
    """Would catch folder markers and renames, which object storage bills and does not need."""
    storage.write_bytes(f"s3://{BUCKET}/requests/one", b"1")
    store.requests.clear()
    storage.write_bytes(f"s3://{BUCKET}/requests/two", b"2")
    assert [request.split()[0] for request in store.requests] == ["PUT"]


def test_a_stage_is_published_or_not(store):
    """Would catch a folder that counts as finished before its last file is there."""
    stage = StageFolder(f"s3://{BUCKET}/stages", "manifest", "abc")
    storage.write_bytes(stage.file("manifest.parquet"), b"x")
    assert not stage.finished
    assert find_stage(stage.run_dir, "manifest") is None
    stage.publish({"rows_in": 1})
    assert find_stage(stage.run_dir, "manifest") == stage


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_failures_that_pass_are_survived(store, status, code):
    """Would catch a night's run ended by one busy second of the store."""
    path = f"s3://{BUCKET}/flaky-{status}"
    for method in ("PUT", "POST", "GET"):
        store.faults.append(Fault(method, status, code, times=2))
    storage.write_bytes(path, b"x")
    assert storage.read_bytes(path) == b"x"
    assert len(store.requests) > 3


def test_a_slow_store_is_waited_for(store):
    """Would catch a read given up because the first byte takes seconds."""
    path = f"s3://{BUCKET}/slow"
    storage.write_bytes(path, b"x")
    store.faults.append(Fault("GET", seconds=4.0))
    started = time.monotonic()
    assert storage.read_bytes(path) == b"x"
    assert time.monotonic() - started >= 4


def test_a_store_that_stays_down_is_a_clear_error(store):
    """Would catch an endless retry, or an error that blames the program."""
    for method in ("HEAD", "GET", "PUT", "POST"):
        store.faults.append(Fault(method, 503, "SlowDown", times=1000))
    with pytest.raises(DataError, match="fails or is throttling"):
        storage.write_bytes(f"s3://{BUCKET}/down", b"x")


def test_denied_and_missing_are_told_apart_at_once(store):
    """Would catch a denial that is asked for again, or told as a missing file."""
    store.faults += [
        Fault(m, 403, "AccessDenied", times=100) for m in ("HEAD", "GET", "PUT", "POST")
    ]
    for action in (
        lambda: storage.exists(f"s3://{BUCKET}/secret"),
        lambda: storage.read_bytes(f"s3://{BUCKET}/secret"),
        lambda: storage.write_bytes(f"s3://{BUCKET}/secret", b"x"),
        lambda: storage.list_names(f"s3://{BUCKET}/secret"),
    ):
        store.requests.clear()
        with pytest.raises(DataError, match=r"access is denied.*AWS_NO_SIGN_REQUEST"):
            action()
        assert len(store.requests) <= 3
    store.faults.clear()
    with pytest.raises(DataError, match="bucket does not exist"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"x")
    with pytest.raises(DataError, match="no-such-bucket-here"):
        read_folder("s3://no-such-bucket-here/images")


def test_an_unreachable_endpoint_is_named(monkeypatch, s3):
    """Would catch minutes of silence before a mistyped endpoint is told."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be reached.*AWS_ENDPOINT_URL"):
        storage.exists(f"s3://{BUCKET}/x")
    assert time.monotonic() - started < 60


def test_images_are_prepared_from_a_bucket_into_a_bucket(store, tmp_path):
    """Would catch keys that URIs spell otherwise, or a denial that is hidden by the quarantine."""
    root, run_dir = f"s3://{BUCKET}/photos", f"s3://{BUCKET}/prepared"
    for name in ("1.png", "a b/ü #2.png"):
        path = tmp_path / "image.png"
        Image.new("RGB", (40, 30), (200, 0, 0)).save(path)
        filesystem, inner = storage.resolve(root)
        with filesystem.open_output_stream(f"{inner}/{name}") as stream:
            stream.write(path.read_bytes())
    classes = f"s3://{BUCKET}/classes.csv"
    storage.write_bytes(classes, b"name\na red thing\n")
    arguments = ["prepare", "folder", "--root", root, "--run-dir", run_dir]
    done = CliRunner().invoke(cli.cli, [*arguments, f"classes.source={classes}"])
    assert done.exit_code == 0, done.output
    assert "2 of 2 rows" in done.output
    assert storage.exists(f"{run_dir}/config.yaml")
    again = CliRunner().invoke(cli.cli, ["label", "--run-dir", run_dir, "--print-config"])
    assert f"source: {classes}" in again.output


def photo(name: str) -> str:
    """Store an image, and return its URI."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 0, 0)).save(data, "PNG")
    uri = f"s3://{BUCKET}/outage/{name}.png"
    storage.write_bytes(uri, data.getvalue())
    return uri


def test_an_outage_costs_no_image(store, monkeypatch):
    """Would catch good images that are quarantined because nothing could be read for a while."""
    uri = photo("1")
    for method in ("HEAD", "GET"):
        store.faults.append(Fault(method, 503, "SlowDown", times=1000))
    with pytest.raises(DataError, match="run the same command again later") as caught:
        images.probe_uri(uri)
    assert not isinstance(caught.value, images.ImageError)
    store.faults.clear()
    assert images.probe_uri(uri)[:2] == (40, 30)


def test_an_object_that_fails_alone_costs_one_image(store, monkeypatch):
    """Would catch a broken object that ends every run that meets it."""
    good, bad = photo("good"), photo("bad")
    for method in ("HEAD", "GET"):
        store.faults.append(Fault(method, 500, "InternalError", times=1000, path="outage/bad.png"))
    table = pa.table({"image_id": ["a", "b"], "uri": [good, bad]})
    decoded = decode_batch(table, ImagesConfig())
    assert decoded["error_kind"].to_pylist() == [None, "unreadable"]


def test_a_header_takes_few_requests(store):
    """Would catch a request for every few bytes of a million images' headers."""
    uri = photo("header")
    store.requests.clear()
    images.probe_uri(uri)
    assert 1 <= len(store.requests) <= 2  # its size, and its first bytes


def test_merging_a_stage_takes_few_requests(store, monkeypatch):
    """Catches a request for every block that is removed, of which a pass writes thousands."""
    # The cluster of the tests started before this server: its workers do not know its address.
    monkeypatch.setattr(compaction, "on_ray", lambda: False)
    stage = StageFolder(f"s3://{BUCKET}/merged", "predictions", "k")
    blocks = 12
    for number in range(blocks):
        ids = pa.table({"image_id": [str(number)]})
        row = {"uri": ["u"], "status": ["ok"], "error_kind": pa.nulls(1, pa.string())}
        row["error"] = row["error_kind"]
        block = pa.table({"image_id": [str(number)], **row})
        write_table(stage.file(BLOCKS, f"w{number:02d}-0.parquet"), block)
        write_table(stage.file(CHECKPOINT, f"w{number:02d}.parquet"), ids)
    store.requests.clear()
    expected = pa.array([str(number) for number in range(blocks)])
    finish(stage, expected, name="predict", seconds=1.0)
    assert storage.list_names(stage.path) == ["part-00000.parquet", "quarantine", "stats.json"]
    assert read_table(stage.path)["image_id"].to_pylist() == expected.to_pylist()
    changing = [r for r in store.requests if r.split()[0] in {"PUT", "POST", "DELETE"}]
    assert len(changing) < 2 * blocks, changing
