"""What travels with a job."""

import zipfile

import pytest

from hts_ray.cluster.shipping import check_size, files_to_ship, write_zip
from hts_ray.errors import ConfigError


def lay_out(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def own_names(root):
    return [file.name for file in files_to_ship(root) if not file.name.startswith("hts_ray/")]


def test_code_travels_and_data_stays(tmp_path):
    """Would catch images, weights, environments or results uploaded with every job."""
    kept = ["classes.csv", "mine.yaml", "teachers/mine.py", "notes/runs/a.txt", ".rayignore"]
    lay_out(tmp_path, dict.fromkeys(kept, "x"))
    left = ["photo.JPG", "a/b.png", "model.safetensors", "old.pt", "t.parquet", "anno.mat",
            "data.tar.gz", ".git/config", ".venv/lib/x.py", "env/lib/y.py", "env/pyvenv.cfg",
            "runs/default/config.yaml", "__pycache__/a.pyc", ".mypy_cache/x.json",
            "out/provenance.json", "out/config.yaml", "out/report.html"]  # fmt: skip
    lay_out(tmp_path, dict.fromkeys(left, "x"))
    assert own_names(tmp_path) == sorted(kept)


def test_this_package_travels_whole_and_once(tmp_path):
    """Would catch a job that runs other code than the submitter's, or without its models."""
    lay_out(tmp_path, {"hts_ray/__init__.py": "old", "main.py": "x"})
    files = {file.name: file for file in files_to_ship(tmp_path)}
    assert files["hts_ray/__init__.py"].source.read_text() != "old"
    assert any(name.endswith(".safetensors") for name in files)
    assert not any("__pycache__" in name for name in files)
    assert "main.py" in files


def test_ignore_files_are_honoured_the_nearest_last(tmp_path):
    """Would catch a secret that .gitignore names being uploaded, or .rayignore without effect."""
    lay_out(
        tmp_path,
        {
            ".git/HEAD": "x",
            ".gitignore": "*.secret\n/big/\nlogs/\n",
            "project/.rayignore": "docs/\n!keep.secret\n!tiny.safetensors\n",
            "project/.gitignore": "keep.secret\n",
            "project/a.secret": "", "project/keep.secret": "", "project/docs/x.md": "",
            "project/tiny.safetensors": "", "project/large.safetensors": "",
            "project/big/x.txt": "", "project/logs/1.txt": "",
            "project/sub/.gitignore": "*\n!only.txt\n", "project/sub/only.txt": "",
            "project/sub/other.txt": "",
        },
    )  # fmt: skip
    assert own_names(tmp_path / "project") == [
        ".gitignore", ".rayignore", "big/x.txt", "keep.secret", "sub/only.txt", "tiny.safetensors",
    ]  # fmt: skip


def test_links_travel_as_what_they_lead_to_and_loops_do_not(tmp_path):
    """Would catch a walk that never ends, or a link that leads nowhere failing the upload."""
    lay_out(tmp_path, {"a/real.csv": "1"})
    (tmp_path / "link.csv").symlink_to(tmp_path / "a" / "real.csv")
    (tmp_path / "nothing.csv").symlink_to(tmp_path / "gone.csv")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert own_names(tmp_path) == ["a/real.csv", "link.csv"]


def test_too_much_is_refused_with_the_largest_named(tmp_path):
    """Would catch a home directory on its way to the cluster."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "huge.txt").write_bytes(b"x" * 3_000_000)
    (tmp_path / "small.txt").write_text("x")
    files = [file for file in files_to_ship(tmp_path) if not file.name.startswith("hts_ray/")]
    assert check_size(files, 3) == pytest.approx(2.86, abs=0.01)
    told = r"2\.9 MiB.*limit is 2 MiB.*logs 2\.9.*logs/huge\.txt 2\.9.*rayignore"
    with pytest.raises(ConfigError, match=told):
        check_size(files, 2)
    with pytest.raises(ConfigError, match="give a folder"):
        files_to_ship(tmp_path / "none")


def test_an_unchanged_directory_makes_the_same_bytes(tmp_path):
    """Would catch an upload repeated because of a changed time stamp."""
    root = tmp_path / "root"
    lay_out(root, {"b.py": "2", "a/run.sh": "1"})
    (root / "a" / "run.sh").chmod(0o755)
    files = [file for file in files_to_ship(root) if not file.name.startswith("hts_ray/")]
    write_zip(files, tmp_path / "1.zip")
    for path in ("b.py", "a/run.sh"):
        (root / path).touch()
    write_zip(files, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["a/run.sh", "b.py"]
        assert archive.getinfo("a/run.sh").external_attr >> 16 == 0o755
