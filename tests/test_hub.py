"""Models on the Hugging Face Hub, without a network: a folder takes its place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from hub_cases import LocalHub
from huggingface_hub import errors
from inference_cases import network_run, save_images, save_run
from safetensors.torch import save_file
from test_commands import refused

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.config import Method
from vi_simsiam.errors import InputError
from vi_simsiam.export import formats, push_to_hub

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub.api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    return hub


@pytest.mark.parametrize("method", ["vi-simsiam", "simsiam"])
def test_a_published_model_encodes_as_its_run(
    method: Method,
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a folder and from a repository, of which one file is fetched."""
    monkeypatch.chdir(tmp_path)
    run, folder = save_run(tmp_path / "run", method), tmp_path / "exported"
    images = save_images(tmp_path / "images", 4)
    assert main(["push-to-hub", str(run), "somebody/photos"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors checked on" in shown
    assert "published: https://huggingface.co/somebody/photos" in shown
    published = {path.name for path in (hub.root / "somebody/photos").iterdir()}
    assert published == {"README.md", "config.json", "model.safetensors"}
    assert hub.public == {"somebody/photos"}
    expected = vi_simsiam.load(run, "cpu").encode(images)
    assert main(["export", str(run), "--format", "safetensors", "--out", str(folder)]) == 0
    for name, revision in (("somebody/photos", "v1"), (folder, None)):
        encoder = vi_simsiam.from_pretrained(name, revision=revision, device="cpu")
        found = encoder.encode(images)
        assert encoder.config.method == method
        for column, value in vars(expected).items():
            if value is None:
                assert getattr(found, column) is None
            else:
                torch.testing.assert_close(getattr(found, column), value)
    assert hub.fetched == [("somebody/photos", "model.safetensors", "v1")]


def test_a_private_run_is_not_written_to_a_public_repository(hub: LocalHub, tmp_path: Path) -> None:
    run = network_run(tmp_path / "run")
    push_to_hub(run, "somebody/secret", private=True)
    assert (hub.root / "somebody/secret/README.md").is_file()
    assert not hub.public
    hub.create_repo("somebody/open", private=None, exist_ok=True)
    with pytest.raises(InputError, match=r"private: https://huggingface\.co/somebody/open exists"):
        push_to_hub(run, "somebody/open", private=True)
    assert not list((hub.root / "somebody/open").iterdir())


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.RepositoryNotFoundError("404", response=response(404)), "no such repository, or"),
        (errors.GatedRepoError("403", response=response(403)), "its owner must grant access"),
        (errors.RevisionNotFoundError("404", response=response(404)), "has no such revision"),
        (errors.HfHubHTTPError("401", response=response(401)), "there is no token, or it has no"),
        (errors.LocalTokenNotFoundError("none"), "log in with hf auth login, or set HF_TOKEN"),
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (errors.HfHubHTTPError("500 wrong\nRequest 1", response=response(500)), "(500 wrong)"),
        (TimeoutError("timed out"), "(timed out)"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    error: Exception,
    reason: str,
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*given: object, **options: object) -> NoReturn:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(InputError, match="name: somebody/photos is no folder here, and") as raised:
        vi_simsiam.from_pretrained("somebody/photos")
    assert reason in str(raised.value)
    monkeypatch.setattr(hub, "upload_folder", fails)
    run = save_run(tmp_path / "run")
    message = refused(f"push-to-hub {run} somebody/photos", capsys)
    assert "repo_id: somebody/photos could not be written" in message
    assert reason in message


def test_names_and_places_of_models(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="it has no model.safetensors; vi-simsiam push-to-hub"):
        vi_simsiam.from_pretrained("somebody/nothing")
    with pytest.raises(InputError, match=r"revision: v1 is of a repository, and .* is on this"):
        vi_simsiam.from_pretrained(tmp_path, revision="v1")
    monkeypatch.undo()  # the client itself, without a network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="a repository on the Hugging Face Hub is named USER/NAME"):
        vi_simsiam.from_pretrained("/nowhere/at/all")
    with pytest.raises(InputError, match="cannot be reached, and no copy is on this machine"):
        vi_simsiam.from_pretrained("somebody/photos")


def test_a_file_whose_settings_are_of_a_larger_model_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = network_run(tmp_path / "run")
    config = formats.portable(run.config)
    config["model"]["dim"] = 2**16
    save_file(run.model.state_dict(), tmp_path / "x.safetensors", {"config": json.dumps(config)})
    build, places = formats.build_model, list[str]()

    def recorded(config: Any) -> Any:
        model = build(config)
        places.extend({weights.device.type for weights in model.parameters()})
        return model

    monkeypatch.setattr(formats, "build_model", recorded)
    with pytest.raises(InputError, match="do not fit the model that its metadata describe"):
        vi_simsiam.from_pretrained(tmp_path / "x.safetensors")
    assert places == ["meta"]
