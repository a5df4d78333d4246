"""A folder in place of the Hugging Face Hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import RepoUrl
from huggingface_hub.errors import EntryNotFoundError


@dataclass
class LocalHub:
    """Repositories are folders of `root`."""

    root: Path
    public: set[str] = field(default_factory=set)
    fetched: list[tuple[str, str, str | None]] = field(default_factory=list)

    def api(self, **about: str) -> Any:
        """In place of `HfApi`."""
        assert about["library_name"] == "vi-simsiam"
        return SimpleNamespace(
            create_repo=self.create_repo,
            repo_info=lambda repo_id: SimpleNamespace(private=repo_id not in self.public),
            upload_folder=self.upload_folder,
        )

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> RepoUrl:
        assert exist_ok
        if not (self.root / repo_id).exists() and not private:
            self.public.add(repo_id)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        """In place of `hf_hub_download`."""
        self.fetched.append((repo_id, filename, revision))
        path = self.root / repo_id / filename
        if not path.exists():
            raise EntryNotFoundError("no such file\nat all")
        return str(path)
