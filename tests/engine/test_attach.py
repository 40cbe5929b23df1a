"""Entering and leaving: exact restore, refusals, order, conflicts, several models at once."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch

import sightline as sl
from sightline.engine.system import System
from sightline.errors import AttachError, HostError, ParameterError
from sightline.hosts import Host
from tests.engine.numerics import assert_close
from tests.engine.toys import nothing, toy, weigh
from tests.engine.whole import forward, generate, times, whole
from tests.tiny_hosts import TINY, TINY_VITS, picture
from tests.traces import differences, trace

CLOSE = 2e-5


def one(host, question: str = "Is there a dog?"):
    return host.inputs([question], [[picture()]])


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_station_is_restored_on_every_host(name, tiny):
    model, inputs = tiny(name).model, one(tiny(name))
    plain, before = forward(model, inputs), trace(model)
    with sl.attach(model, nothing(), weigh()):
        assert len(differences(before, trace(model))) > 10, "the trace would not notice"
        assert (forward(model, inputs) - plain).abs().max() > 1e-3
    assert differences(before, trace(model)) == []
    assert torch.equal(forward(model, inputs), plain)


@pytest.mark.parametrize("name", TINY_VITS)
def test_plain_transformers_are_restored(name, tiny_vit):
    model = tiny_vit(name).model
    before = trace(model)
    with sl.attach(model, toy(vision_attention=lambda site: None, pixels=lambda site, x: None)):
        assert differences(before, trace(model)) != []
    assert differences(before, trace(model)) == []


def test_restored_after_an_exception_inside(tiny):
    model = tiny("llava").model
    before = trace(model)
    with pytest.raises(KeyError, match="mine"), sl.attach(model, nothing()):
        raise KeyError("mine")
    assert differences(before, trace(model)) == []


@pytest.mark.parametrize(
    "station", ["pixels", "vision_attention", "visual_tokens", "hidden", "attention", "cache", "logits"]
)
def test_restored_and_usable_after_an_exception_in_a_station(station, tiny):
    host = tiny("llava")
    inputs, before = one(host), trace(host.model)
    plain = generate(host.model, inputs)
    broken = [True]

    def fail(site, *args):
        if broken[0]:
            raise ZeroDivisionError(station)

    with sl.attach(host.model, toy(**{station: fail})):
        with pytest.raises(ZeroDivisionError, match=station):
            generate(host.model, inputs)
        broken.clear()
        broken.append(False)
        found = generate(host.model, inputs)
    assert torch.equal(found[1], plain[1])
    assert differences(before, trace(host.model)) == []


def test_a_failed_forward_leaves_no_sequence_open(tiny):
    """What runs outside the model afterwards (a probe of the decoder, say) is none of the systems' business."""
    host = tiny("llava")
    steps = []
    with sl.attach(host.model, toy(hidden=lambda site, x: steps.append(site.step))) as attached:
        with pytest.raises(ValueError, match="image"):
            host.model(input_ids=one(host)["input_ids"], pixel_values=torch.zeros(2, 3, 48, 48))  # two for one picture
        assert attached.sequences.current is None
        host.model.model.language_model(input_ids=torch.tensor([[1, 2]]))
    assert steps == []


@pytest.mark.parametrize("cls", [ParameterError, RuntimeError, KeyboardInterrupt])
def test_restored_when_a_system_refuses_to_prepare(cls, tiny):
    model = tiny("llava").model
    before = trace(model)

    def refuse(shape):
        shape.first_states()
        raise cls("no")

    with pytest.raises(cls, match="no"):
        sl.attach(model, nothing(), toy(prepare=refuse, attention=lambda site: None))
    assert differences(before, trace(model)) == []


def test_restored_when_entering_fails_half_way(tiny):
    """The tower is taken first; then the text attention turns out to be of another kind."""
    model = copy.deepcopy(tiny("llava").model)
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    before = trace(model)
    with pytest.raises(HostError, match="flash_attention_2"):
        sl.attach(model, nothing())
    assert differences(before, trace(model)) == []


def test_attach_and_detach_without_a_block(tiny):
    host = tiny("llava")
    inputs, before = one(host), trace(host.model)
    plain = forward(host.model, inputs)
    attached = sl.attach(host.model, weigh())
    edited = forward(host.model, inputs)
    sl.detach(host.model)
    assert differences(before, trace(host.model)) == []
    assert torch.equal(forward(host.model, inputs), plain)
    assert (edited - plain).abs().max() > 1e-3
    attached.close()  # again: nothing left to do
    with sl.attach(host.model, weigh()):
        assert torch.equal(forward(host.model, inputs), edited)
        sl.detach(host.model)  # before the block ends
        assert torch.equal(forward(host.model, inputs), plain)
    with pytest.raises(AttachError, match="nothing is attached"):
        sl.detach(host.model)


def test_saving_while_attached_tells_nobody(tiny, tmp_path):
    host = tiny("llava")
    model = copy.deepcopy(host.model)  # saving itself writes into the configuration
    with sl.attach(model, nothing()):
        model.save_pretrained(tmp_path)
        names = set(model.state_dict())
    assert "sightline" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))
    assert names == set(host.model.state_dict())
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(forward(loaded, one(host)), forward(host.model, one(host)))


def test_a_model_that_was_left_is_not_held(tiny):
    model = copy.deepcopy(tiny("llava").model)
    with sl.attach(model, weigh()) as attached:
        forward(model, one(tiny("llava")))
    gone = weakref.ref(attached)
    del attached
    gc.collect()
    assert gone() is None, "the model still holds what was attached to it"


# -- refusing ---------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused(tiny):
    model = tiny("llava").model
    with sl.attach(model, toy(name="first", logits=lambda site, x: None)):
        inside = trace(model)
        for system in (nothing(), toy(logits=lambda site, x: None)):
            with pytest.raises(AttachError, match=r"already carries \[first\]"):
                sl.attach(model, system)
        with pytest.raises(AttachError, match="already carries"):
            sl.attach(model)
        assert differences(inside, trace(model)) == []


def test_a_part_and_its_whole_are_refused_together(tiny):
    model = tiny("llava").model
    tower = model.model.vision_tower
    looking = toy(vision_attention=lambda site: None)
    with sl.attach(tower, looking), pytest.raises(AttachError, match="part of this model"):
        sl.attach(model, nothing())
    with sl.attach(model, nothing()), pytest.raises(AttachError, match="part of this model"):
        sl.attach(tower, looking)


def test_what_is_not_a_system_is_refused(tiny):
    model = tiny("llava").model
    before = trace(model)
    wrong = {
        "sl.catalog.parse": "var",
        "write System()": System,
        "see `sightline list`": None,
        "attach(model, first, second)": [nothing()],
        "fna is a module to build networks with": sl.mix.FNA(4, 2, window=3),
        "the model comes first": model,
    }
    for mend, given in wrong.items():
        with pytest.raises(ParameterError, match=r"is not a system") as caught:
            sl.attach(model, given)
        assert mend in str(caught.value)
        assert len(str(caught.value)) < 250, "the printout of a model fills pages"
    assert differences(before, trace(model)) == []


def test_what_is_not_a_model_is_refused(tiny):
    host = tiny("llava")
    wrong = {
        "is no model": host.processor,
        "give its .model": host,
        "the model comes first": nothing(),
        "'tiny'": "tiny",
    }
    for mend, given in wrong.items():
        with pytest.raises(ParameterError, match=r"^attach\(model, \*systems\)") as caught:
            sl.attach(given, nothing())
        assert mend in str(caught.value)
    with pytest.raises(ParameterError, match=r"'llava' is not a sightline\.hosts\.Host"):
        sl.attach(host.model, nothing(), host="llava")


def test_wrapped_models_and_parts_of_models_are_named(tiny):
    model = copy.deepcopy(tiny("llava").model)  # torch.compile leaves a note on what it wraps
    wrappers = {"model.module": torch.nn.DataParallel(model), "model._orig_mod": torch.compile(model)}
    for path, wrapper in wrappers.items():
        with pytest.raises(HostError, match=f"holds a LlavaForConditionalGeneration: give that part of it, {path}"):
            sl.attach(wrapper, nothing())
    with pytest.raises(HostError, match="LlavaModel has no output head: give the LlavaForConditionalGeneration"):
        sl.attach(model.model, nothing())


def test_an_attachment_that_was_left_is_not_entered_again(tiny):
    model = tiny("llava").model
    attached = sl.attach(model, nothing())
    assert repr(attached).endswith("on LlavaForConditionalGeneration>")
    sl.detach(model)
    with pytest.raises(AttachError, match=r"taken off LlavaForConditionalGeneration.*call attach"), attached:
        pass


@pytest.mark.parametrize("order", [1, -1])
def test_conflicts_are_named_whoever_knows_of_them(order, tiny):
    first, second = toy(name="first", logits=lambda site, x: None), toy(name="second", logits=lambda site, x: None)
    type(first).conflicts = lambda self, other: "they quarrel" if other is second else None
    with pytest.raises(AttachError, match="cannot run together: they quarrel"):
        sl.attach(tiny("llava").model, *[first, second][::order])
    with pytest.raises(AttachError, match="'second' and 'second' cannot run together: both would do the same"):
        sl.attach(tiny("llava").model, second, type(second)())


def test_a_plain_transformer_has_no_text_stations(tiny_vit):
    model = tiny_vit("clip").model
    before = trace(model)
    with pytest.raises(HostError, match=r"no language model: stations \['attention', 'hidden'\]"):
        sl.attach(model, toy(attention=lambda s: None, hidden=lambda s, x: None, vision_attention=lambda s: None))
    assert differences(before, trace(model)) == []


def test_unknown_models_are_refused_with_the_facts_to_give():
    with pytest.raises(HostError, match="Host"):
        sl.attach(torch.nn.Linear(2, 2), nothing())


def test_a_host_given_by_hand(tiny):
    host = tiny("llava")
    facts = Host("mine", ("LlavaForConditionalGeneration",))
    with sl.attach(host.model, weigh(), host=facts):
        edited = forward(host.model, one(host))
    with sl.attach(host.model, weigh()):
        assert torch.equal(forward(host.model, one(host)), edited)
    with pytest.raises(HostError, match="decoder"):
        sl.attach(host.model, weigh(), host=Host("mine", (), decoder="model.nowhere"))


def test_a_prompt_of_embeddings_is_refused(tiny):
    host = tiny("llava")
    states = host.model.get_input_embeddings()(one(host)["input_ids"])
    with sl.attach(host.model, weigh()), pytest.raises(AttachError, match="give input_ids"):
        host.model(inputs_embeds=states)


# -- several systems, several models --------------------------------------------------------------------------------------


def test_systems_act_in_the_order_given(tiny):
    host = tiny("llava")
    inputs = one(host)
    plain = forward(host.model, inputs)[:, -1]
    add, double = toy(logits=lambda site, x: x + 1), toy(logits=lambda site, x: x * 2)
    for systems, wanted in (((add, double), (plain + 1) * 2), ((double, add), plain * 2 + 1)):
        with sl.attach(host.model, *systems):
            assert torch.equal(forward(host.model, inputs)[:, -1], wanted)


def test_attention_edits_of_two_systems_compose(tiny):
    host = tiny("llava")
    with sl.attach(host.model, weigh(2.0), weigh(1.5)):
        found = forward(host.model, one(host))
    assert_close("logits", found, forward(whole(host, one(host), times(3.0)), one(host)), CLOSE)


def test_each_system_has_its_own_memory(tiny):
    host = tiny("llava")
    seen = {}

    def remember(name):
        def hidden(site, x):
            site.state.setdefault("layers", []).append(site.layer)
            site.tally["calls"] = site.tally.get("calls", 0) + 1
            seen[name] = (site.state, site.tally, site.setup)

        return hidden

    first, second = (toy(prepare=lambda shape, n=n: n, hidden=remember(n), name=n) for n in ("a", "b"))
    type(first).report = lambda self, tally, setup: {"calls": tally["calls"], "setup": setup}
    with sl.attach(host.model, first, second) as attached:
        generate(host.model, one(host), 3)
        generate(host.model, one(host), 3)
    assert seen["a"][0]["layers"] == [0, 1, 2, 3] * 3  # a sequence remembers itself only
    assert seen["a"][0] is not seen["b"][0]
    assert seen["a"][2] == "a"
    assert attached.report() == {"a": {"calls": 24, "setup": "a"}, "b": {}}


def test_nothing_attached_is_nothing_changed(tiny):
    model = tiny("llava").model
    before = trace(model)
    with sl.attach(model) as attached:
        assert [d for d in differences(before, trace(model)) if "dict" not in d] == []
    assert attached.report() == {}


def test_two_models_in_two_threads(tiny):
    """The attention interface is process-wide; what a model carries is not."""
    hosts = [tiny("llava"), tiny("qwen2_5_vl"), tiny("llava_next")]
    systems = [weigh(3.0), weigh(0.2), None]

    def answer(host, system):
        with sl.attach(host.model, *([system] if system else [])):
            return generate(host.model, one(host), 6)

    wanted = [answer(*pair) for pair in zip(hosts, systems, strict=True)]
    found: list = [None] * 3
    start = threading.Barrier(3)

    def work(i):
        torch.set_grad_enabled(False)
        start.wait()
        found[i] = [answer(hosts[i], systems[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i in range(3):
        for ids, logits in found[i]:
            assert torch.equal(ids, wanted[i][0])
            assert torch.equal(logits, wanted[i][1])


def test_training_through_an_edit(tiny):
    """Gradients of the weights are those of the whole maps."""
    host = tiny("llava")
    inputs = host.inputs(["Is there a dog?", "How many red cups are on the table?"], [[picture()], []])
    labels = inputs["input_ids"].masked_fill(
        inputs["attention_mask"].cumsum(1) <= 1, -100
    )  # padding predicts the first
    oracle = whole(host, inputs, times(3.0)).train()
    model = copy.deepcopy(host.model).train()
    with sl.attach(model, weigh(3.0)):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    wanted = oracle(**inputs, labels=labels).loss
    wanted.backward()
    assert_close("loss", loss, wanted, CLOSE)
    right = dict(oracle.named_parameters())
    for name, p in model.named_parameters():
        if right[name].grad is not None and right[name].grad.abs().max() > 1e-5:
            assert_close(name, p.grad, right[name].grad, 1e-4)


def test_recomputing_layers_in_the_backward_pass_is_refused(tiny):
    """Gradient checkpointing runs layers again when the systems are gone: the gradients would be of another model."""
    host = tiny("llava")
    model = copy.deepcopy(host.model).train()
    model.gradient_checkpointing_enable()
    with sl.attach(model, weigh()), pytest.raises(HostError, match="gradient_checkpointing_disable"):
        model(**one(host))
    with sl.attach(model.eval(), weigh()):
        forward(model, one(host))


# -- traces in memory and in warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "systems", [(), (sl.steer.VAR(sink_dims=(3, 7), tau=2.0),), (sl.decode.DAMRO(),), (sl.prune.ZipVL(),)]
)
def test_an_attachment_is_gone_with_its_last_user(tiny, systems):
    """No reference cycle keeps it, and the recordings and caches it holds, until the collector runs."""
    host = tiny("llava")
    attached = sl.attach(host.model, *systems)
    generate(host.model, one(host), max_new_tokens=2)
    attached.close()
    gone = weakref.ref(attached)
    gc.collect()
    gc.disable()
    try:
        del attached
        assert gone() is None
    finally:
        gc.enable()


def test_warnings_point_at_the_line_that_attaches(tiny):
    model = tiny("llava").model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for system in (sl.steer.CCA(), sl.steer.AKIMMA(), sl.steer.VAR(tau=3.9)):
            sl.attach(model, system).close()
        sl.load("tiny").ask(picture(), "What is there?", systems=[sl.steer.CCA()], max_new_tokens=1)
    caught = [found for found in caught if issubclass(found.category, sl.errors.SightlineWarning)]
    assert len(caught) == 4
    assert {found.filename for found in caught} == {__file__}


def test_a_warning_during_generate_points_at_the_call(tiny):
    host = tiny("llava")
    inputs = one(host)
    with torch.no_grad():
        cache = host.model(**inputs, use_cache=True).past_key_values
    more = torch.tensor([[5]])
    with (
        sl.attach(host.model, nothing()),
        pytest.warns(sl.errors.SightlineWarning, match="cache filled before") as caught,
    ):
        host.model(input_ids=more, past_key_values=cache, use_cache=True)
    assert caught[0].filename == __file__
