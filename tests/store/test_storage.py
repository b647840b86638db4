"""Paths and URIs behave alike, and failures of remote storage say what to mend."""

import re

import fsspec
import pytest
from pyarrow import fs as pafs

from hts_ray.errors import DataError
from hts_ray.store import storage


def test_local_and_file_uri_are_the_same_file(tmp_path):
    """Would catch a URI that is read from another place than it was written to."""
    path = storage.join(str(tmp_path), "a", "b.json")
    storage.write_json(path, {"x": 1})
    assert storage.read_json(f"file://{path}") == {"x": 1}
    storage.write_json(f"file://{path}", {"x": 2})
    assert storage.read_json(path) == {"x": 2}
    assert storage.list_names(str(tmp_path / "a")) == ["b.json"]
    assert storage.list_names(str(tmp_path / "none")) == []


def test_overwriting_never_leaves_a_temporary_file(tmp_path):
    """Would catch litter that a folder reader takes for data."""
    path = str(tmp_path / "x.bin")
    for data in (b"1", b"22"):
        storage.write_bytes(path, data)
    assert storage.read_bytes(path) == b"22"
    assert storage.list_names(str(tmp_path)) == ["x.bin"]


def test_unknown_scheme_is_a_clear_error():
    """Would catch a pyarrow traceback for a mistyped scheme, or one without the right ones."""
    with pytest.raises(DataError, match=r"sss://bucket/x.*s3://, gs://"):
        storage.exists("sss://bucket/x")


def test_a_missing_package_is_named(monkeypatch):
    """Would catch an ImportError shown as a fault of the program."""

    def missing(_):
        raise ImportError("Install adlfs to access Azure Datalake Gen2")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"az:// needs a package.*adlfs.*on every node"):
        storage.exists("az://container/x")


def test_remote_is_told_from_local(tmp_path):
    """Would catch a Windows-like or relative path taken for a URI."""
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("file:///tmp/x")
    assert not storage.is_remote("runs/x")
    assert storage.absolute("s3://b/k") == "s3://b/k"
    assert storage.absolute("x").startswith("/")


def test_remove_tree_is_quiet_when_there_is_nothing(tmp_path):
    """Would catch a clean-up that fails on a second call."""
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "f").write_text("x")
    storage.remove_tree(str(folder))
    storage.remove_tree(str(folder))
    assert not folder.exists()


def test_protocols_of_fsspec_work_without_code_of_ours():
    """Would catch a store that pyarrow does not know (hf://, az://, ...) being unusable."""
    root = "memory://run"
    storage.write_json(f"{root}/a/b.json", {"x": 1})
    assert storage.read_json(f"{root}/a/b.json") == {"x": 1}
    assert storage.list_names(f"{root}/a") == ["b.json"]  # renamed into place, nothing left over
    assert storage.exists(f"{root}/a")
    storage.remove_tree(root)
    assert not storage.exists(f"{root}/a/b.json")


def test_hub_uris_are_opened_by_the_hub_s_client():
    """Would catch hf:// sent to a file system that does not know it."""
    filesystem, inner = storage.resolve("hf://datasets/org/name/images")
    assert filesystem.type_name == "py::fsspec+hf"
    assert inner.startswith("datasets/org/name")


def test_a_bucket_is_opened_once_and_anew_for_another_environment(monkeypatch):
    """Would catch a region look-up for every small file, or settings that stick."""
    made = []

    def make(**options):
        made.append(options)
        return pafs.LocalFileSystem()

    monkeypatch.setattr(pafs, "S3FileSystem", make)
    monkeypatch.setattr(pafs, "resolve_s3_region", lambda bucket: f"region-of-{bucket}")
    for name in storage.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for path in ("s3://one/a%20b.png", "s3://one/c/"):
        storage.resolve(path)
    assert [options["region"] for options in made] == ["region-of-one"]
    assert storage.resolve("s3://one/a%20b.png")[1] == "one/a b.png"
    assert storage.resolve("s3://one/c/")[1] == "one/c"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    storage.resolve("s3://one/c")
    assert made[1]["endpoint_override"] == "http://127.0.0.1:9000"
    assert made[1]["region"] == "us-east-1"  # no look-up at a store with an endpoint of its own
    assert made[1]["anonymous"]
    assert not made[0]["anonymous"]


def test_google_s_emulator_and_public_buckets_are_set_by_the_environment(monkeypatch):
    """Would catch gs:// that asks for credentials where none are needed."""
    made = []
    monkeypatch.setattr(pafs, "GcsFileSystem", lambda **o: made.append(o) or pafs.LocalFileSystem())
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:4443")
    storage.resolve("gs://bucket/x")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GS_NO_SIGN_REQUEST", "1")
    storage.resolve("gs://bucket/x")
    assert (made[0]["scheme"], made[0]["endpoint_override"]) == ("http", "127.0.0.1:4443")
    assert [options["anonymous"] for options in made] == [True, True]
    assert made[1]["endpoint_override"] is None


@pytest.mark.parametrize(
    ("message", "words", "refused"),
    [
        ("AWS Error ACCESS_DENIED during PutObject operation", "access is denied", True),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2", "the bucket does not exist", True),
        ("AWS Error INVALID_ACCESS_KEY_ID", "credentials are not valid", True),
        ("AWS Error UNKNOWN (HTTP status 301)", "set AWS_REGION", True),
        ("AWS Error SLOW_DOWN during PutObject", "throttling.*goes on where it was", False),
        ("AWS Error NETWORK_CONNECTION: curlCode: 7", "cannot be reached", False),
        ("google::cloud::Status(PERMISSION_DENIED: x)", "access is denied", True),
        ("something new", "something new", False),
    ],
)
def test_failures_are_explained(message, words, refused):
    """Would catch a cause that is told wrong, or a denial that is asked for again and again."""
    error = OSError(message)
    assert re.search(words, storage.explain("s3://b/k", error))
    assert storage.is_refusal(error) is refused


def test_only_errors_that_may_pass_are_tried_again(monkeypatch):
    """Would catch a denial that is asked for four times, or a retry that nobody can count."""
    pauses, again = [], []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    answers = iter([OSError("busy"), OSError("busy"), b"x"])

    def action():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    retried = lambda: again.append(1)  # noqa: E731
    assert storage.retry(action, lambda error: "busy" in str(error), 2, retried) == b"x"
    assert len(pauses) == len(again) == 2
    assert pauses[0] < pauses[1] * 3
    answers = iter([OSError("denied"), b"x"])
    with pytest.raises(OSError, match="denied"):
        storage.retry(action, lambda error: "busy" in str(error))
    assert len(pauses) == 2


def test_remote_failures_end_as_user_errors_and_local_ones_as_they_are(monkeypatch):
    """Would catch a traceback for a bucket that is down, or a missing file that is retried."""
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    calls = []

    def fail(error):
        calls.append(error)
        raise error

    with pytest.raises(DataError, match="throttling"):
        storage.patiently("s3://b/k", lambda: fail(OSError("SLOW_DOWN")))
    assert len(calls) == 4
    for path, error in (("s3://b/k", FileNotFoundError()), ("/x", OSError("SLOW_DOWN"))):
        with pytest.raises(type(error)):
            storage.patiently(path, lambda error=error: fail(error))
    assert len(calls) == 6
