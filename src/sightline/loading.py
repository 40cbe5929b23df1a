"""`load`: a vision-language model by name, folder or Hub id, after every check that needs no weights.

A model that is missing, text-only, of an unknown class, or too large for the machine is refused before its weights are
downloaded or read. Weights are read from safetensors only; code from a repository runs only with trust_remote_code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.errors import MissingExtraError, ModelError, ParameterError, SightlineError
from sightline.lvlm import LVLM, check_question
from sightline.memory import check_fits
from sightline.sources import BUNDLED, Source, find_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from sightline.hosts import Host

__all__ = ["BUNDLED", "DTYPES", "LVLM", "check_device", "check_dtype", "check_question", "find_source", "load"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}


def load(
    name: str = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
    host: Host | None = None,
) -> LVLM:
    """Load a vision-language model and its processor, in eval mode.

        lvlm = sl.load("tiny")
        lvlm.ask("photo.jpg", "Is there a dog?", systems=[sl.steer.VAR()])

    Args:
        name: "tiny" (bundled), a folder written by `save_pretrained`, or a Hub id.
        device: "cpu", "cuda", "cuda:N" or "mps"; by default the best one present.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; by default as stored, float32 for "tiny".
        device_map: spread over several devices by accelerate, for example "auto"; instead of `device`.
        quantization: "4bit" or "8bit", by bitsandbytes.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: allow code of the repository to run.
        attn_implementation: of transformers; what runs wherever no system is attached.
        host: where the model keeps its parts, for a class that sightline does not know.

    Raises:
        ParameterError: an argument is outside what is allowed.
        ModelError: not found, offline, gated, text-only, without safetensors, damaged, too large, or no such device.
        HostError: the model's class is unknown; the message says which facts to pass as `host`.
        MissingExtraError: accelerate or bitsandbytes is needed.
    """
    dtype = check_dtype(dtype) or ("float32" if name in BUNDLED else "auto")
    _check_placement(device, device_map, quantization)
    target = check_device(device)
    source = find_source(name, revision, trust_remote_code)
    if device_map is None:
        check_fits(name, source.parameters, dtype, quantization, target)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not source.local and revision is not None:
        common["revision"] = revision
    host = host or _find_host(source, common)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
        device_map = device_map or {"": target}
    if device_map is not None:
        options["device_map"] = device_map
    model, processor = _read(source, common, options)
    if device_map is None:
        model.to(target)
    return LVLM(model.eval(), processor, host, name)


def check_dtype(dtype: str | torch.dtype | None) -> str | None:
    """The name of a dtype, or None; ParameterError lists what is allowed."""
    text = None if dtype is None else str(dtype).removeprefix("torch.")
    if text is not None and text not in DTYPES:
        raise ParameterError(f"dtype={text!r} is not supported: choose one of {', '.join(DTYPES)}")
    return text


def check_device(device: str | torch.device | None) -> str:
    """The device to use, present on this machine; by default CUDA, then MPS, then the CPU."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    text = str(device)
    kind, colon, index = text.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not index.isdecimal()):
        raise ParameterError(f"device={text!r} is unknown: choose cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {text!r} is absent: torch {torch.__version__} sees no CUDA card; choose device cpu")
    if kind == "cuda" and colon and int(index) >= torch.cuda.device_count():
        raise ModelError(f"device {text!r} is absent: the last CUDA card is cuda:{torch.cuda.device_count() - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is absent: it needs macOS on Apple silicon; choose device cpu")
    return text


def _check_placement(device: Any, device_map: Any, quantization: str | None) -> None:
    if device is not None and device_map is not None:
        raise ParameterError(f"device={str(device)!r} and device_map={device_map!r} exclude each other: give one")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ParameterError(f"quantization={quantization!r} is not supported: choose 4bit, 8bit or none")
    if quantization is not None and find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"quantization={quantization!r} needs bitsandbytes: pip install 'sightline[quant]'")
    if (device_map is not None or quantization is not None) and find_spec("accelerate") is None:
        raise MissingExtraError(f"device_map={device_map!r} needs accelerate: pip install 'sightline[accelerate]'")


def _quantization_config(quantization: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**QUANTIZATIONS[quantization], bnb_4bit_compute_dtype=torch.bfloat16)


def _find_host(source: Source, common: dict[str, Any]) -> Host:
    """The host of the model's class, found on a copy without weights (the meta device)."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from sightline import hosts

    with _as_model_error(source.name), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.location, **common)
        skeleton = AutoModelForImageTextToText.from_config(
            config, trust_remote_code=common["trust_remote_code"], attn_implementation="sdpa"
        )
    host = hosts.find(skeleton)
    hosts.check(skeleton, host)
    return host


def _read(source: Source, common: dict[str, Any], options: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Download (with progress) if need be, and read. The processor first: it is small and fails early."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

    with _as_model_error(source.name), _bars(not source.local):
        if source.local and not any(Path(source.location).glob("*processor_config.json")):
            raise ModelError(
                f"model {source.name!r} has no processor (no processor_config.json or preprocessor_config.json): "
                "write it there too, processor.save_pretrained(folder)"
            )
        processor = AutoProcessor.from_pretrained(source.location, **common)
        if not isinstance(processor, ProcessorMixin):
            raise ModelError(
                f"model {source.name!r} has no image processor (no preprocessor_config.json): add its processor files"
            )
        model, notes = AutoModelForImageTextToText.from_pretrained(
            source.location, use_safetensors=True, output_loading_info=True, **common, **options
        )
    if notes["missing_keys"]:
        first, count = sorted(notes["missing_keys"])[0], len(notes["missing_keys"])
        raise ModelError(
            f"model {source.name!r}: {count} weights are missing from its files, for example {first!r}; fetch it again"
        )
    _set_padding(model, processor)
    return model, processor


def _set_padding(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Batches need a padding token; where a model has none, its end-of-text token serves (it is masked anyway)."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """What the libraries raise while reading a model, as one line that names it."""
    try:
        yield
    except SightlineError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot load model {name!r}: {reason}") from error


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    """Progress bars for downloads; none for a folder, which is read in seconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not show:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
