"""Models on the Hugging Face Hub: an export uploaded, and one opened to encode images."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from vi_simsiam import __version__
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import FileSource
from vi_simsiam.engine.run import Run, resolve_device, resolve_workers
from vi_simsiam.errors import InputError, UserError, cut
from vi_simsiam.export.folder import export_run, title
from vi_simsiam.export.formats import WEIGHTS, read_safetensors
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.paths import user_path
from vi_simsiam.text import one_line

_LOGIN = "log in with hf auth login, or set HF_TOKEN"


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Encoder:
    """Open a published model: ``vi_simsiam.from_pretrained("USER/NAME").encode(images)``.

    Of a repository one file is downloaded, `model.safetensors`, into huggingface_hub's cache. It
    holds tensors and settings, no code, and folders that its settings name are not opened.

    Args:
        name: a folder or file of `vi-simsiam export --format safetensors`, or a repository on the
            Hugging Face Hub that `vi-simsiam push-to-hub` wrote.
        revision: a branch, tag or commit of the repository; None for its main branch.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
        workers: threads that read images; None for a number that suits the device.

    Raises:
        InputError: no such folder or repository, no connection or no access to it, a damaged file
            or one of another format, or no such device.
    """
    place, threads = resolve_device(device), resolve_workers(workers, resolve_device(device))
    path = user_path("name", name)
    if not path.exists():
        from huggingface_hub import hf_hub_download

        with _on_the_hub(f"name: {name} is no folder here, and could not be downloaded"):
            path = Path(hf_hub_download(str(name), WEIGHTS, revision=revision))
    elif revision is not None:
        raise InputError(f"revision: {revision} is of a repository, and {path} is on this machine")
    config, model = read_safetensors(path)
    splits = Splits(config.data, FileSource((), name=config.data), None)
    # The file does not hold the step of its weights.
    return Encoder(Run(path, config, model.to(place), splits, place, threads, 0, 0))


def push_to_hub(
    run: Run,
    repo_id: str,
    *,
    format: str = "safetensors",
    private: bool = False,
    report: Callable[[str], None] | None = None,
) -> str:
    """Export a run, with its model card, to a repository on the Hugging Face Hub.

    Other files in the repository stay. The token is the one that huggingface_hub finds.

    Args:
        run: a trained run.
        repo_id: USER/NAME, or NAME for the user of the token; made if it does not exist.
        format: see `export_run`; `from_pretrained` opens safetensors.
        private: make the repository private.
        report: see `export_run`.

    Returns:
        The repository's address.

    Raises:
        InputError: as `export_run`; a name that is not accepted, no connection, no token with the
            right to write, or a public repository where a private one is asked for.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as place:
        folder = export_run(run, format, Path(place, format), report=report)
        api = HfApi(library_name="vi-simsiam", library_version=__version__)
        with _on_the_hub(f"repo_id: {repo_id} could not be written"):
            # None leaves the choice to the settings of the user or organisation.
            created = api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(created.repo_id).private:
                raise InputError(f"private: {created} exists and is public; nothing was uploaded")
            api.upload_folder(
                repo_id=created.repo_id, folder_path=folder, commit_message=title(run.config)
            )
    return str(created)


@contextlib.contextmanager
def _on_the_hub(failed: str) -> Iterator[None]:
    """Turn an error of the block into `failed` with the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each of the Hub's clients raises its own
        raise InputError(f"{failed} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return "a repository on the Hugging Face Hub is named USER/NAME"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner must grant access; {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hugging Face Hub cannot be reached, and no copy is on this machine"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it has no {WEIGHTS}; vi-simsiam push-to-hub writes one"
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"there is no token, or it has no right to do so: {_LOGIN}"
    return cut(one_line((str(error).splitlines() or [""])[0])) or type(error).__name__
