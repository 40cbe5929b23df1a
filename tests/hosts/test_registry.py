"""Known models are found and their paths exist; unknown, wrong and text-only ones get errors that tell the mend."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn

from sightline import hosts
from sightline.errors import HostError
from sightline.hosts.guess import guess
from tests.tiny_hosts import TINY, TINY_VITS


@pytest.mark.parametrize("name", list(TINY))
def test_every_path_of_a_family_exists(name: str) -> None:
    model = TINY[name]().model
    host = hosts.find(model)
    hosts.check(model, host)
    assert isinstance(host, hosts.Host)
    layers = hosts.get(model, f"{host.decoder}.{host.layers}")
    attention = [hosts.get(layer, host.attention) for layer in layers]
    assert [a.layer_idx for a in attention] == list(range(len(layers)))
    tower = hosts.get(model, f"{host.tower}.{host.tower_layers}")
    assert all(hasattr(hosts.get(layer, host.tower_attention), "config") for layer in tower)
    assert getattr(model.config, host.image_token) == TINY[name]().processor.tokenizer.convert_tokens_to_ids(
        {"gemma3": "<image_soft_token>"}.get(host.name, TINY[name]().processor.image_token)
    )


@pytest.mark.parametrize("name", list(TINY))
def test_tower_and_projector_are_what_the_model_uses(name: str) -> None:
    """The projector runs once per encoding, the tower's attention in every layer, the decoder's once per step."""
    tiny = TINY[name]()
    host, calls = hosts.find(tiny.model), []

    def watch(module: nn.Module, label: str) -> None:
        module.register_forward_pre_hook(lambda *_: calls.append(label))

    watch(hosts.get(tiny.model, host.projector), "projector")
    for part, layers, attention in (
        ("decoder", f"{host.decoder}.{host.layers}", host.attention),
        ("tower", f"{host.tower}.{host.tower_layers}", host.tower_attention),
    ):
        for layer in hosts.get(tiny.model, layers):
            watch(hosts.get(layer, attention), part)
    from tests.tiny_hosts import picture

    tiny.model(**tiny.inputs(["What?"], [[picture()]]))
    assert calls.count("decoder") == 4
    assert calls.count("projector") == 1
    assert calls.count("tower") == len(hosts.get(tiny.model, f"{host.tower}.{host.tower_layers}"))


@pytest.mark.parametrize(("name", "prefix"), [("llava", 1), ("llava_onevision", 0), ("internvl", 1), ("idefics3", 0)])
def test_prefix_of_towers(name: str, prefix: int) -> None:
    model = TINY[name]().model
    assert hosts.prefix(model, hosts.find(model)) == prefix


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("clip", 1),
        ("siglip", 0),
        ("vit", 1),
        ("dinov2", 1),
        ("dinov2_registers", 3),
        ("timm", 1),
        ("timm_registers", 5),
    ],
)
def test_plain_vision_transformers(name: str, prefix: int) -> None:
    model = TINY_VITS[name]().model
    host = hosts.find(model)
    hosts.check(model, host)
    assert isinstance(host, hosts.ViTHost)
    assert hosts.prefix(model, host) == prefix
    assert host.fused == name.startswith("timm")


def test_llava_with_a_siglip_tower_has_no_class_token() -> None:
    config = TINY["llava"]().model.config
    vision = tf.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8
    )
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=config.text_config))
    assert hosts.prefix(model, hosts.find(model)) == 0


def test_qwen3_vl_names_its_deepstack() -> None:
    model = TINY["qwen3_vl"]().model
    assert hosts.get(model.config, hosts.find(model).deepstack) == [0, 1]


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
TWO = {"vision_config": SMALL, "text_config": SMALL | {"bos_token_id": 1, "eos_token_id": 2}}
MOE = {
    "text_config": SMALL | {"num_experts": 2, "vocab_size": 64, "moe_intermediate_size": 8, "head_dim": 8},
    "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 32},
}
SISTERS = {
    "Qwen3VLMoeForConditionalGeneration": (tf.Qwen3VLMoeConfig, MOE, "qwen3_vl"),
    "CLIPModel": (tf.CLIPConfig, TWO, "clip_inside"),
    "CLIPVisionModelWithProjection": (tf.CLIPVisionConfig, SMALL, "clip_inside"),
    "CLIPForImageClassification": (tf.CLIPConfig, TWO, "clip_inside"),
    "SiglipModel": (tf.SiglipConfig, TWO, "siglip_inside"),
    "SiglipForImageClassification": (tf.SiglipConfig, TWO, "siglip_inside"),
    "ViTForImageClassification": (tf.ViTConfig, SMALL, "vit_inside"),
    "Dinov2ForImageClassification": (tf.Dinov2Config, SMALL, "dinov2_inside"),
}


@pytest.mark.parametrize("name", list(SISTERS))
def test_sister_classes_have_the_same_facts(name: str) -> None:
    config, facts, host = SISTERS[name]
    with torch.device("meta"):
        built = getattr(tf, name)(config(**facts))
    assert hosts.find(built).name == host
    hosts.check(built, hosts.find(built))
    if "image" in built.input_modalities and host != "qwen3_vl":
        (layout,) = hosts.layouts(built, TINY_VITS["vit"]().processor, {"pixel_values": torch.zeros(1)}, [(50, 60)])
        patch = getattr(built.config, "vision_config", built.config).patch_size
        assert layout.grids == ((48 // patch, 48 // patch),)


def test_known_classes_of_the_registry_exist() -> None:
    import timm.models.vision_transformer

    hosts.load_all()
    for name in hosts.REGISTRY:
        assert hasattr(tf, name) or hasattr(timm.models.vision_transformer, name), name


def test_subclass_of_a_known_class_is_known() -> None:
    tiny = TINY["llava"]()

    class Mine(type(tiny.model)):
        pass

    tiny.model.__class__ = Mine
    assert hosts.find(tiny.model).name == "llava"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, Attention())


class Stack(nn.Module):
    def __init__(self, length: int, attention: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(attention) for _ in range(length))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye_vision = nn.Module()
        self.eye_vision.encoder = Stack(2, "attn")
        self.brain = Stack(5, "self_attention")
        self.connector = nn.Linear(4, 4)


class MadeUpForConditionalGeneration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Inner()
        self.config = tf.PreTrainedConfig(image_token_index=7)


def test_unknown_class_is_told_what_to_pass() -> None:
    """The Host in the message can be pasted: its facts fit the model."""
    model = MadeUpForConditionalGeneration()
    with pytest.raises(HostError, match="not a known host") as raised:
        hosts.find(model)
    text = str(raised.value)
    call = text[text.index("sightline.hosts.Host(") + len("sightline.hosts.") : text.index("))") + 1]
    facts = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call).body[0].value.keywords}
    hosts.check(model, hosts.Host(**facts))
    assert facts["decoder"] == "body.brain"
    assert facts["tower"] == "body.eye_vision"
    assert facts["tower_layers"] == "encoder.blocks"
    assert facts["tower_attention"] == "attn"
    assert facts["image_token"] == "image_token_index"
    assert "tower_prefix" in text


def test_what_cannot_be_seen_is_marked() -> None:
    model = MadeUpForConditionalGeneration()
    model.config = tf.PreTrainedConfig()
    del model.body.connector
    facts = guess(model)
    assert facts["projector"].startswith("<")
    assert facts["image_token"].startswith("<")
    with pytest.raises(HostError, match="between tower and decoder"):
        hosts.find(model)


@pytest.mark.parametrize("name", [*TINY, *TINY_VITS])
def test_guesses_are_true_for_known_families(name: str) -> None:
    """What is read off the module tree of the known families is what their hosts say."""
    model = (TINY | TINY_VITS)[name]().model
    host = hosts.find(model)
    facts = guess(model, seeing_only=isinstance(host, hosts.ViTHost))
    if isinstance(host, hosts.ViTHost):
        for fact in ("tower_attention",):
            assert facts[fact] == repr(getattr(host, fact)), fact
        seen = f"{ast.literal_eval(facts['tower'])}.{ast.literal_eval(facts['tower_layers'])}".strip(".")
        assert seen == f"{host.tower}.{host.tower_layers}".strip(".")
    else:
        for fact in ("decoder", "layers", "attention", "tower", "tower_layers", "tower_attention"):
            assert facts[fact] == repr(getattr(host, fact)), fact
        assert getattr(model.config, ast.literal_eval(facts["image_token"])) == getattr(model.config, host.image_token)


@pytest.mark.parametrize("kind", [tf.DeiTModel, tf.BeitModel])
def test_unknown_vision_transformer_is_told_a_vithost(kind: type) -> None:
    with torch.device("meta"):
        model = kind(kind.config_class(num_hidden_layers=2, hidden_size=12, num_attention_heads=2))
    with pytest.raises(HostError, match=r"hosts\.ViTHost\(") as raised:
        hosts.find(model)
    text = str(raised.value)
    call = text[text.index("ViTHost(") : text.index("))") + 1]
    facts = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call).body[0].value.keywords}
    hosts.check(model, hosts.ViTHost(**facts))
    assert "decoder" not in text


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("decoder", "model.brain"),
        ("layers", "blocks"),
        ("attention", "attn"),
        ("tower", "model.eye"),
        ("tower_layers", "blocks"),
        ("tower_attention", "attn"),
        ("projector", "model.bridge"),
        ("image_token", "picture_id"),
    ],
)
def test_check_names_every_wrong_fact(fact: str, value: str) -> None:
    model = TINY["llava"]().model
    host = dataclasses.replace(hosts.find(model), **{fact: value})
    with pytest.raises(HostError, match=rf"{fact}='{value}'") as raised:
        hosts.check(model, host)
    assert "seen:" in str(raised.value)  # the right value is offered


def test_check_names_several_wrong_facts_at_once() -> None:
    model = TINY["llava"]().model
    host = dataclasses.replace(hosts.find(model), projector="model.bridge", tower="model.eye", image_token="picture_id")
    with pytest.raises(HostError) as raised:
        hosts.check(model, host)
    for fact in ("projector=", "tower=", "image_token="):
        assert fact in str(raised.value)


def test_check_of_a_vision_transformer() -> None:
    model = TINY_VITS["timm"]().model
    with pytest.raises(HostError, match=r"tower_layers='layers'.*ViTHost"):
        hosts.check(model, hosts.ViTHost("mine", ("VisionTransformer",), tower_layers="layers"))


def test_text_model_is_told_in_one_line() -> None:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(HostError) as raised:
        hosts.find(tf.LlamaForCausalLM(config))
    text = str(raised.value)
    assert "no vision tower and no image token" in text
    assert "\n" not in text
    assert len(text) < 150


def test_two_hosts_for_one_class_are_refused() -> None:
    with pytest.raises(HostError, match="already served by host 'llava'"):
        hosts.register(hosts.Host("other", ("LlavaForConditionalGeneration",)))


def test_hosts_load_without_model_code() -> None:
    code = (
        "import sys; from sightline import hosts; hosts.load_all(); print(len(hosts.REGISTRY), [m for m in "
        "('torch', 'transformers', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out.split()[0]) >= 15
    assert "[]" in out
