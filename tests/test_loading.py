"""Loading: every family from a folder, and one line for everything that can be wrong before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.smolvlm import processing_smolvlm

from sightline import loading, memory, sources
from sightline.errors import HostError, MissingExtraError, ModelError, ParameterError, SightlineError
from sightline.hosts import REGISTRY, Host
from sightline.loading import load
from tests.tiny_hosts import TINY, TinyHost, picture

FAMILIES = sorted(set(TINY) - {"gemma3_pan_and_scan"})  # pan and scan is an option of the same files


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the tiny LLaVA, as `save_pretrained` writes it."""
    return save(TINY["llava"](), tmp_path_factory.mktemp("models") / "llava")


def save(host: TinyHost, folder: Path) -> Path:
    host.model.save_pretrained(folder)
    host.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refuse_to_read(monkeypatch) -> None:
    def fail(*args, **kwargs):
        pytest.fail("weights were read")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", fail)


def error_of(name, kind: type[SightlineError] = ModelError, **options) -> str:
    with pytest.raises(kind) as caught:
        load(str(name), **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_as_it_was_saved(name, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # an optional package, used for videos only
    made = TINY[name]()
    lvlm = load(str(save(made, tmp_path / name)), device="cpu")
    assert type(lvlm.model) is type(made.model)
    assert REGISTRY[type(made.model).__name__] is lvlm.host
    assert not lvlm.model.training
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), lvlm.model.parameters(), strict=True))
    answer = lvlm.ask(picture(), "Is there a dog?", max_new_tokens=4)
    direct = loading.LVLM(made.model, made.processor, lvlm.host, name)
    assert answer == direct.ask(picture(), "Is there a dog?", max_new_tokens=4)


def test_dtype(saved, copy, monkeypatch):
    assert load(str(saved), device="cpu").dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert load(str(saved), device="cpu", dtype=dtype).dtype == torch.bfloat16
    load(str(saved), device="cpu", dtype="bfloat16").model.save_pretrained(copy)
    assert load(str(copy), device="cpu").dtype == torch.bfloat16  # as stored
    assert load(str(copy), device="cpu", dtype="float32").dtype == torch.float32
    monkeypatch.setitem(sources.BUNDLED, "tiny", copy)
    assert load("tiny", device="cpu").dtype == torch.float32
    assert load(device="cpu", dtype="auto").dtype == torch.bfloat16


def test_options_reach_transformers(saved):
    lvlm = load(str(saved), device_map="auto", attn_implementation="eager")
    assert lvlm.model.config.text_config._attn_implementation == "eager"
    assert lvlm.name == str(saved)


def test_local_reading_is_quiet_and_bars_come_back(saved, capfd):
    load(str(saved), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_models_without_a_padding_token(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = json.loads((copy / "generation_config.json").read_text())
    generation.pop("pad_token_id", None)
    (copy / "generation_config.json").write_text(json.dumps(generation))
    lvlm = load(str(copy), device="cpu")
    assert len(lvlm.ask(picture(), ["a", "a longer question"], max_new_tokens=2)) == 2


@pytest.mark.parametrize("dtype", ["int8", "float64", "half", torch.int64])
def test_dtypes_that_are_refused(dtype):
    said = error_of("tiny", ParameterError, dtype=dtype)
    assert repr(str(dtype).removeprefix("torch.")) in said
    assert "auto, float32, bfloat16, float16" in said


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"device": "gpu"}, ParameterError, "device='gpu' is unknown: choose cpu, cuda, cuda:N or mps"),
        ({"device": "cuda:x"}, ParameterError, "'cuda:x' is unknown"),
        ({"device": "cuda"}, ModelError, "device 'cuda' is absent"),
        ({"device": "cuda:1"}, ModelError, "device 'cuda:1' is absent"),
        ({"device": "mps"}, ModelError, "device 'mps' is absent"),
        ({"device": "cpu", "device_map": "auto"}, ParameterError, "exclude each other"),
        ({"quantization": "3bit"}, ParameterError, "'3bit' is not supported: choose 4bit, 8bit"),
    ],
)
def test_places_that_are_refused(saved, monkeypatch, options, kind, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refuse_to_read(monkeypatch)
    assert named in error_of(saved, kind, **options)


def test_devices_that_are_present(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert loading.check_device(None) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert loading.check_device(None) == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.check_device(None) == "cuda"
    assert loading.check_device(torch.device("cuda:1")) == "cuda:1"
    with pytest.raises(ModelError, match="'cuda:2' is absent: the last CUDA card is cuda:1"):
        loading.check_device("cuda:2")


@pytest.mark.parametrize(
    ("options", "missing"),
    [({"quantization": "4bit"}, "bitsandbytes"), ({"device_map": "auto"}, "accelerate")],
)
def test_missing_extras(saved, monkeypatch, options, missing):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == missing else True)
    said = error_of(saved, MissingExtraError, **options)
    assert missing in said
    assert "pip install 'sightline[" in said


def test_quantization_reaches_transformers(saved, monkeypatch):
    seen = {}

    def read(location, **options):
        seen.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", read)
    assert error_of(saved, device="cpu", quantization="4bit").endswith("enough")
    assert seen["quantization_config"].load_in_4bit
    assert seen["device_map"] == {"": "cpu"}
    assert seen["use_safetensors"] is True
    assert seen["trust_remote_code"] is False


def test_too_large_is_refused_before_reading(saved, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    refuse_to_read(monkeypatch)
    assert "cpu has 0.0 GiB free: choose" in error_of(saved, device="cpu")


def test_parameters_are_counted_from_the_files(saved, tmp_path):
    host = TINY["llava"]()
    count = sum(p.numel() for p in host.model.parameters())
    assert sources.find_source(str(saved)).parameters == {"F32": count}
    host.model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert sources.find_source(str(tmp_path / "shards")).parameters == {"F32": count}


def test_paths_that_hold_no_model(tmp_path, copy):
    (tmp_path / "empty").mkdir()
    assert "holds no model (no config.json)" in error_of(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "merge it" in error_of(tmp_path / "empty")
    assert "no such folder" in error_of(tmp_path / "nowhere")
    assert "no such folder" in error_of("./nowhere")
    assert "is a file" in error_of(copy / "config.json")
    assert "'' is no name" in error_of("")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_damaged_settings(copy, text):
    (copy / "config.json").write_text(text, errors="surrogateescape")
    said = error_of(copy)
    assert str(copy) in said
    assert "config.json" in said


def test_weights_that_are_missing_or_damaged(copy, tmp_path):
    whole = safetensors.torch.load_file(copy / "model.safetensors")
    dropped = sorted(whole)[3]
    part = {key: value for key, value in whole.items() if key != dropped}
    safetensors.torch.save_file(part, copy / "model.safetensors", {"format": "pt"})
    assert "1 weights are missing from its files" in error_of(copy, device="cpu")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    assert "'model.safetensors' is damaged" in error_of(copy)
    (copy / "model.safetensors").unlink()
    assert "has no weights" in error_of(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    assert "only pickled weights" in error_of(copy)
    TINY["llava"]().model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    lost.unlink()
    assert f"{lost.name!r} is missing" in error_of(tmp_path / "shards")


def test_a_model_without_its_processor(copy):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copy / name).unlink(missing_ok=True)
    said = error_of(copy, device="cpu")
    assert str(copy) in said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "(model_type 'llama') is text-only: a vision-language model is needed"),
        ({"model_type": "clip"}, "(model_type 'clip') does not answer questions about pictures"),
        ({"model_type": "novel"}, f"(model_type 'novel') is not known to transformers {transformers.__version__}"),
        ({"model_type": "novel", "auto_map": {"AutoModel": "x.Y"}}, "allow it with trust_remote_code=True"),
    ],
)
def test_other_kinds_of_models(copy, monkeypatch, changes, named):
    edit_config(copy, **changes)
    refuse_to_read(monkeypatch)
    assert named in error_of(copy)


def test_an_unknown_class_is_told_before_reading(copy, monkeypatch):
    monkeypatch.delitem(REGISTRY, "LlavaForConditionalGeneration")
    monkeypatch.setattr("sightline.hosts.load_all", lambda: None)
    with monkeypatch.context() as patch:
        refuse_to_read(patch)
        assert "LlavaForConditionalGeneration" in error_of(copy, HostError)
    host = Host(name="mine", classes=("LlavaForConditionalGeneration",))
    assert load(str(copy), device="cpu", host=host).host is host


# The Hub. Nothing here reaches the network: conftest sets offline mode, and answers are made up below.


@pytest.mark.parametrize("name", ["owner/no-such-model", "gpt9"])
def test_offline(name):
    said = error_of(name)
    assert repr(name) in said
    assert "unset HF_HUB_OFFLINE" in said


def test_a_bad_id():
    assert "neither a folder nor a Hub id" in error_of("no such model!")


def answer(monkeypatch, error: type[Exception]) -> None:
    def model_info(*args, **kwargs):
        if issubclass(error, huggingface_hub.errors.HfHubHTTPError):
            raise error("404", response=SimpleNamespace(headers={}, request=None))
        raise error("no way")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, "was not found, here or on the Hub"),
        (huggingface_hub.errors.GatedRepoError, "is gated: accept its terms on https://huggingface.co/owner/model"),
        (huggingface_hub.errors.RevisionNotFoundError, "has no revision 'v9'"),
        (ConnectionError, "the Hub cannot be reached"),
        (TimeoutError, "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, error, named):
    answer(monkeypatch, error)
    assert named in error_of("owner/model", revision="v9")


def hub(monkeypatch, folder: Path, files: list[str], parameters: dict[str, int]) -> None:
    """A Hub that has one repository with these files, of which config.json can be downloaded."""
    info = SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=file) for file in files], safetensors=SimpleNamespace(parameters=parameters)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision=None: str(folder / file))


def test_hub_models_are_checked_before_their_weights_are_downloaded(monkeypatch, copy):
    refuse_to_read(monkeypatch)
    hub(monkeypatch, copy, ["config.json", "model.safetensors"], {"BF16": 10**13})
    assert "'owner/model' needs 20489.1 GiB (auto), but cpu has" in error_of("owner/model", device="cpu")
    edit_config(copy, model_type="llama")
    assert "is text-only" in error_of("owner/model", device="cpu")
    hub(monkeypatch, copy, ["config.json", "pytorch_model.bin"], {})
    assert "only pickled weights" in error_of("owner/model")
    hub(monkeypatch, copy, ["README.md"], {})
    assert "has no config.json" in error_of("owner/model")


def test_the_download_cache_is_used_offline(monkeypatch, copy, tmp_path):
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--owner--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(copy, repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    lvlm = load("owner/model", device="cpu")
    assert lvlm.name == "owner/model"
    assert lvlm.ask(picture(), "Is there a dog?", max_new_tokens=2)
