"""The commit in a checkpoint's metadata."""

from alignvlm_jax.train import checkpoint, commit
from tests.conftest import tiny_config


def test_where_there_is_no_git_the_launch_scripts_name_the_commit(tmp_path, monkeypatch):
    """In an image and on a rented host the metadata said "unknown", of the very runs that
    matter."""
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "alignvlm_jax" / "train" / "commit.py"))
    (tmp_path / "alignvlm_jax" / "train").mkdir(parents=True)
    config = tiny_config(stage="align")

    def noted() -> str:
        commit.git_hash.cache_clear()
        return checkpoint.describe((config,), config, train_seconds=2.0, answer_loss=0.5)["git"]

    assert noted() == "unknown"
    (tmp_path / "COMMIT").write_text("abc-dirty\n")
    assert noted() == "abc-dirty"
    monkeypatch.setenv("ALIGNVLM_COMMIT", "def")
    assert noted() == "def"
    commit.git_hash.cache_clear()
