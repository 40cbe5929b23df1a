"""Where a model is and what it is, found out before any of its weights are downloaded or read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sightline.errors import ModelError

BUNDLED = {"tiny": Path(__file__).parent / "models" / "tiny-llava"}
HUB_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Source:
    """A model that exists, with what its small files say."""

    name: str  # as the user wrote it
    location: str  # folder, or Hub id
    local: bool
    config: dict[str, Any]  # its config.json
    parameters: dict[str, int] | None  # safetensors dtype -> number of parameters; None: not known


def find_source(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """The model of that name: bundled, a folder, or a Hub id (from the cache when the Hub cannot be reached).

    Raises:
        ModelError: not found, offline, gated, no vision-language model, without safetensors, or in need of own code.
    """
    if not isinstance(name, str) or not name.strip():
        given = repr(name) if isinstance(name, str) or name is None else f"of type {type(name).__name__}"
        raise ModelError(f"model {given} is no name: give 'tiny', a folder or a Hub id")
    folder = BUNDLED[name] if name in BUNDLED else Path(name).expanduser()
    if name in BUNDLED and not (folder / "config.json").is_file():
        raise ModelError(f"the bundled model {name!r} is missing from this installation: no files in {str(folder)!r}")
    if folder.is_dir():
        source = _from_folder(name, folder)
    elif folder.exists():
        raise ModelError(f"model {name!r} is a file: give the folder it lies in, or a Hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"model {name!r}: no such folder; check the path, or give a Hub id such as owner/name")
    else:
        source = _from_hub(name, revision)
    _check_kind(source, trust_remote_code)
    return source


def _from_folder(name: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        mend = "it is an adapter, merge it into its base model" if adapter else "give one written by save_pretrained"
        raise ModelError(f"folder {name!r} holds no model (no config.json): {mend}")
    return Source(name, str(folder), True, _read_json(folder / "config.json", name), _count(name, folder))


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {path.name} cannot be read ({error}); fetch the model again") from error
    if not isinstance(read, dict):
        raise ModelError(f"model {name!r}: {path.name} holds no settings; fetch the model again")
    return read


def _count(name: str, folder: Path) -> dict[str, int]:
    """Number of parameters per dtype, from the headers of the safetensors files that the index names."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_read_json(index, name).get("weight_map", {}).values()))
    else:
        files = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if not files:
        raise ModelError(_no_safetensors(name, any(folder.glob("*.bin"))))
    counts: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(folder / file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(key)
                    counts[part.get_dtype()] += prod(part.get_shape())
        except (OSError, SafetensorError) as error:
            reason = "missing" if not (folder / file).exists() else f"damaged ({error})"
            raise ModelError(f"model {name!r}: weight file {file!r} is {reason}; fetch the model again") from error
    return dict(counts)


def _no_safetensors(name: str, pickled: bool) -> str:
    if pickled:
        return (
            f"model {name!r} has only pickled weights (.bin), which can run code when read: "
            "choose a safetensors version, or convert it once with save_pretrained"
        )
    return f"model {name!r} has no weights (no model.safetensors): fetch the model again, whole"


def _from_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub import errors as hub

    try:
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if "config.json" not in files:
            raise ModelError(
                f"model {name!r} on the Hub has no config.json: it is no transformers model, choose another"
            )
        if not any(file.endswith(".safetensors") for file in files):
            raise ModelError(_no_safetensors(name, any(file.endswith(".bin") for file in files)))
        config = _read_json(Path(hf_hub_download(name, "config.json", revision=revision)), name)
    except hub.HFValidationError:
        raise ModelError(f"model {name!r} is neither a folder nor a Hub id (owner/name): check the spelling") from None
    except hub.GatedRepoError:
        raise ModelError(
            f"model {name!r} is gated: accept its terms on https://huggingface.co/{name}, then `hf auth login`"
        ) from None
    except hub.RevisionNotFoundError:
        raise ModelError(
            f"model {name!r} has no revision {revision!r}: choose a branch, tag or commit it has"
        ) from None
    except hub.RepositoryNotFoundError:
        raise ModelError(
            f"model {name!r} was not found, here or on the Hub: check the spelling (private ones need `hf auth login`); "
            "'tiny' is bundled"
        ) from None
    except ModelError:
        raise
    except Exception as error:  # no network, a proxy, a time-out, offline mode: each client has its own class
        return _from_cache(name, revision, error)
    parameters = dict(info.safetensors.parameters) if info.safetensors else None
    return Source(name, name, False, config, parameters)


def _from_cache(name: str, revision: str | None, error: Exception) -> Source:
    """What an earlier download left, when the Hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        offline = type(error).__name__ == "OfflineModeIsEnabled"
        reason = "offline mode is set, unset HF_HUB_OFFLINE" if offline else "the Hub cannot be reached, go online"
        raise ModelError(
            f"model {name!r} is no folder here and not in the download cache, and {reason}; 'tiny' is bundled"
        ) from error
    return _from_folder(name, Path(config).parent)


def _check_kind(source: Source, trust_remote_code: bool) -> None:
    """Refuse what is no vision-language model, by the model_type in its config.json."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind, what = (
        source.config.get("model_type"),
        f"model {source.name!r} (model_type {source.config.get('model_type')!r})",
    )
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if "auto_map" in source.config:
        if not trust_remote_code:
            raise ModelError(
                f"{what} needs code from its repository: read it, then allow it with trust_remote_code=True"
            )
        return
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{what} is text-only: a vision-language model is needed, such as 'tiny' or a LLaVA or Qwen-VL"
        )
    if kind in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{what} does not answer questions about pictures: a vision-language model is needed, try 'tiny'"
        )
    raise ModelError(
        f"{what} is not known to transformers {__version__}: upgrade transformers, or choose another model"
    )
