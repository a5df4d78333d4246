"""A mark on folders that this user made: places that are named in others are not followed.

A configuration names folders: of images, of downloads, of decoded images, of another run. Whoever
opens a folder that somebody else made would read and write there. It can name a Python module, too,
whose code would run. So a folder gets a hash of its places, keyed by a secret that this user alone
can read; another's folder, and one whose places were edited, have no hash that fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vi_simsiam.config import NAMED_DATA, TrainConfig
from vi_simsiam.data.cache import cache_folder
from vi_simsiam.errors import InputError
from vi_simsiam.files import read_bytes, write_text
from vi_simsiam.other_backbones import refuse_code

ORIGIN = ".origin"
"""The file with the mark, in the folder that it is about."""
_SECRET_BYTES = 32
_DEFAULT = TrainConfig()


def places(config: TrainConfig) -> dict[str, Any]:
    """The places that a configuration names, as plain JSON types; also a module of one's own."""
    plain = config.to_dict()
    found = {name: plain[name] for name in ("data", "data_root", "cache_dir")}
    found["frozen_run"] = None  # earlier versions marked it, too
    if config.init is not None:
        found["init"] = plain["init"]
    if config.model.backbone.startswith("module:"):
        found["backbone"] = config.model.backbone
    return found


def check_weights(folder: Path, config: TrainConfig, given: Collection[str] = ()) -> None:
    """Refuse weights that a run from elsewhere names, and that a training would begin with.

    Args:
        folder: the run.
        config: its configuration as it was read.
        given: the fields that the user names anew.

    Raises:
        InputError: it names some.
    """
    if is_own(folder, places(config)):
        return
    if "init" not in given and config.init is not None:
        raise InputError(
            f"config: {folder} names the weights {config.init}, but this user has not trained it "
            "here, or its configuration was changed since; name them with --init"
        )


def check_code(folder: Path, config: TrainConfig) -> None:
    """Refuse a run from elsewhere whose backbone is a module that this user does not trust.

    Raises:
        InputError: it is.
    """
    if not is_own(folder, places(config)):
        refuse_code(str(folder), config.model.backbone)


def mark(folder: Path, named: object) -> None:
    """Mark a folder as made by this user here.

    Without a place for the secret there is no mark: the folder is then one from elsewhere.

    Args:
        folder: an existing folder.
        named: what it names, plain JSON types.
    """
    secret = _secret(make=True)
    if secret is None:
        (folder / ORIGIN).unlink(missing_ok=True)
    elif not is_own(folder, named):  # the same mark need not be written
        write_text(folder / ORIGIN, _hash(secret, named) + "\n")


def is_own(folder: Path, named: object) -> bool:
    """True if this user marked the folder here, and it named the same then.

    Args:
        folder: the folder.
        named: what it names now, plain JSON types.
    """
    secret = _secret(make=False)
    if secret is None:
        return False
    try:
        found = read_bytes(folder / ORIGIN, "run", most=1024)
    except InputError:
        return False
    return hmac.compare_digest(found.strip(), _hash(secret, named).encode())


def placed(
    folder: Path,
    config: TrainConfig,
    *,
    data: str | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> TrainConfig:
    """The configuration of a run with the places that may be used now.

    Args:
        folder: the run.
        config: its configuration as it was read.
        data: the data set that the user names; None for the run's own.
        data_root: the folder of downloaded data sets that the user names; None for the run's own.
        cache_dir: the folder of decoded images that the user names; None for the run's own.

    Returns:
        The places given; the others are the run's where this user trained it here, else defaults.

    Raises:
        InputError: the run is from elsewhere, and its images are neither named nor embedded.
    """
    if not is_own(folder, places(config)):
        published = config.data in NAMED_DATA  # a name, no place
        if data is None and config.data != "fashion-mini" and not (published and data_root):
            option = "--data-root" if published else "--data"
            raise InputError(
                f"run: {folder} names the images {config.data}, but this user has not trained it "
                "here, or its configuration was changed since; name the place of the images with "
                f"{option}"
            )
        config = dataclasses.replace(config, data_root=_DEFAULT.data_root, cache_dir=None)
    given = {"data": data, "data_root": data_root, "cache_dir": cache_dir}
    named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **named)


def _hash(secret: bytes, named: object) -> str:
    content = json.dumps(named, sort_keys=True).encode()
    return hashlib.blake2b(content, key=secret, digest_size=32).hexdigest()


def _secret(*, make: bool) -> bytes | None:
    """This user's secret; None if there is none, it cannot be made, or others can read it."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    try:
        path = cache_folder() / f"origin-{user}.key"  # several users may share a cache folder
        if make and not os.path.lexists(path):
            _make_secret(path)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_SECRET_BYTES + 1)
    except (OSError, InputError):
        return None
    # In the folder of temporary files somebody else may have made it.
    private = not hasattr(os, "getuid") or (
        status.st_uid == user and not stat.S_IMODE(status.st_mode) & 0o077
    )
    return content if private and len(content) == _SECRET_BYTES else None


def _make_secret(path: Path) -> None:
    """Write a new secret; where another process does so at the same time, its secret stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a renamed file it replaces none
    finally:
        temporary.unlink(missing_ok=True)
