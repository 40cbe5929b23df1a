"""DEEM's loss: its parts against the formulas and diffusers' own training loss, and where gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.errors import InputError, ModelError, ParameterError
from sightline.train.deem import (
    DEEM,
    DiffusionFeedbackLoss,
    RegionTokens,
    VisualTokens,
    add_noise,
    extract_region,
    feedback_timesteps,
    pool_region,
    region_loss,
    region_of,
    resized_positions,
    sincos_positions,
    target_of,
)
from sightline.train.parts.adapting import adapted, stratified_timesteps
from sightline.train.parts.resampler import Resampler, published_keys

SETTINGS = DEEM(queries=5, hidden=24, depth=2, heads=3)
WIDTH, GRID, SIDE = 16, 4, 32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def painter(kind="epsilon"):
    """A random UNet and VAE of diffusers, a few thousand weights each, 32 pixels to 4 x 8 x 8."""
    library = pytest.importorskip("diffusers")
    vae = library.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8), norm_num_groups=2, sample_size=SIDE, scaling_factor=0.7,
    )  # fmt: skip
    unet = library.UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    return unet, vae, library.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_time_steps_keep_to_the_middle():
    assert feedback_timesteps(torch.tensor([0, 500, 999])).tolist() == [200, 500, 799]
    found = feedback_timesteps(torch.arange(1000))
    assert (found.min(), found.max(), found.dtype) == (200, 799, torch.int64)
    assert (found.diff() >= 0).all()
    assert torch.equal(feedback_timesteps(torch.arange(1000), spread=1.0), torch.arange(1000))
    assert feedback_timesteps(torch.tensor([0, 50, 99]), total=100).tolist() == [20, 50, 79]


def test_regions():
    maps, mask = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1:3, 2] = 1
    region = extract_region(maps, mask)
    assert torch.equal(region[0, :, 1:3, 2], maps[0, :, 1:3, 2])
    assert torch.equal(region * (1 - mask), torch.zeros_like(region))
    assert torch.allclose(pool_region(maps, mask)[0], maps[0, :, 1:3, 2].mean(-1))
    assert torch.equal(pool_region(maps, mask)[1], torch.zeros(3))  # an empty region
    one = torch.zeros(1, 1, 8, 8)
    one[..., 3, 0] = 0.1
    assert region_of(one, (4, 4)).nonzero().tolist() == [[0, 0, 1, 0]]  # whatever it touches, by bilinear weights
    assert region_of(torch.ones(1, 1, 7, 5), (3, 4)).all()


def test_region_loss():
    error = torch.rand(2, 4, 6, 6)
    assert torch.allclose(region_loss(error, torch.ones(2, 1, 12, 12)), error.mean())
    assert region_loss(error) == error.mean()
    assert region_loss(error, torch.zeros(2, 1, 6, 6)) == 0
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, 0, :2, :3], mask[1, 0, 5, 5] = 1, 1
    wanted = (error[0, :, :2, :3].mean() + error[1, :, 5, 5].mean()) / 2  # every picture weighs the same
    assert torch.allclose(region_loss(error, mask), wanted)
    changed = error + (1 - mask) * torch.rand(2, 4, 6, 6)
    assert torch.equal(region_loss(changed, mask), region_loss(error, mask))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_the_scheduler(kind):
    _, _, scheduler = painter(kind)
    z, noise, steps = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([0, 417, 999])
    kept = scheduler.alphas_cumprod[steps]
    assert torch.allclose(add_noise(z, noise, kept), scheduler.add_noise(z, noise, steps), atol=1e-6)
    wanted = noise if kind == "epsilon" else scheduler.get_velocity(z, noise, steps)
    assert torch.allclose(target_of(kind, z, noise, kept), wanted, atol=1e-6)


def test_positions():
    found = sincos_positions(8, 3)
    assert found.shape == (10, 8)
    assert not found[0].any()
    speeds = torch.tensor([1.0, 0.01])
    row, column = 2, 1
    wanted = torch.cat([f(place * speeds) for place in (row, column) for f in (torch.sin, torch.cos)])
    assert torch.allclose(found[1 + 3 * row + column], wanted)


# -- modules ----------------------------------------------------------------------------------------------------------


def naive_attention(layer, x, tokens):
    """One query and one head at a time."""
    q, k, v = layer.query(x), layer.key(tokens), layer.value(tokens)
    size = q.shape[-1] // layer.heads
    rows = []
    for row in range(len(x)):
        heads = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            qs, ks = layer.q_norm(q[row, :, part]), layer.k_norm(k[row, :, part])
            heads.append(torch.stack([(ks @ one / size**0.5).softmax(0) @ v[row, :, part] for one in qs]))
        rows.append(torch.cat(heads, -1))
    return layer.out(torch.stack(rows))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_of_the_resampler(qk_norm):
    layer = Resampler(5, 12, 7, depth=1, heads=3, qk_norm=qk_norm).layers[0].cross.eval().double()
    for norm in (layer.q_norm, layer.k_norm) if qk_norm else ():
        nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 9, 7, dtype=torch.float64)
    fast, slow = layer(x, tokens), naive_attention(layer, x, tokens)
    assert torch.allclose(fast, slow)
    assert torch.allclose(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (fast, slow)))


def test_the_resampler_is_the_query_branch_of_blip2():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48,
                                encoder_hidden_size=8, cross_attention_frequency=2)  # fmt: skip
    theirs = Blip2QFormerModel(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Resampler(5, 12, 8, depth=3, heads=3, qk_norm=False).eval()
    state = {f"blip2qformer.{k}": v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(published_keys({"queries": ours.queries.detach(), **state}))
    tokens = torch.randn(2, 6, 8)
    wanted = theirs(query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=tokens).last_hidden_state
    assert torch.allclose(ours(tokens), wanted, atol=1e-5)


def test_visual_tokens_see_only_the_region():
    module = SETTINGS.tokens(WIDTH, GRID).eval()
    tokens, mask = torch.randn(2, 1 + GRID**2, WIDTH), torch.zeros(2, 1, GRID, GRID)
    mask[:, :, 1, 1:] = 1
    other = tokens.clone()
    other[:, 1:][~region_of(mask, (GRID, GRID)).flatten(1)] = 7.0
    assert torch.equal(module(tokens, mask), module(other, mask))
    assert not torch.allclose(module(tokens), module(other))
    assert torch.equal(module(tokens), module(tokens, torch.ones(2, 1, 50, 50)))
    assert module(tokens).shape == (2, 5, 24)


def test_positions_at_the_size_of_a_map():
    positions = torch.randn(9, 5)
    same = resized_positions(positions, (3, 3))
    assert torch.equal(same[:, 1, 2], positions[5])
    assert resized_positions(positions, (6, 6)).shape == (5, 6, 6)
    assert torch.allclose(resized_positions(torch.ones(9, 5), (6, 6)), torch.ones(5, 6, 6), atol=1e-6)


def test_region_tokens_stand_first():
    seen = []

    class Spy(nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return tokens

    module = VisualTokens(WIDTH, GRID, Spy(), regions=True).eval()
    tokens, mask = torch.randn(2, 1 + GRID**2, WIDTH), torch.ones(2, 1, 20, 20)
    maps = [torch.randn(2, WIDTH, 8, 8), torch.randn(2, WIDTH, 4, 4)]
    module(tokens, mask, maps)
    assert seen[0].shape == (2, 3 + 1 + GRID**2, WIDTH)
    placed = [x + resized_positions(module.positions[1:], x.shape[-2:]) for x in maps]
    assert torch.equal(seen[0][:, :3], module.regions(placed, mask))
    pooled = module.regions.pooled(placed[0].mean((2, 3)))
    assert torch.allclose(seen[0][:, 0], pooled, atol=1e-6)
    with pytest.raises(InputError, match="mask and the encoder's feature maps"):
        module(tokens)
    assert isinstance(module.regions, RegionTokens)


# -- the loss -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["epsilon", "v_prediction"])
def eye(request):
    """(loss, encoder, tokens module, pictures)."""
    loss = SETTINGS.feedback(*painter(request.param)).train()
    return loss, nn.Linear(9, WIDTH), SETTINGS.tokens(WIDTH, GRID), torch.rand(2, 3, SIDE, SIDE)


def test_against_the_training_loss_of_diffusers(eye):
    """What diffusers' text-to-image training computes, with visual tokens instead of a text's."""
    loss, _, tokens, pictures = eye
    q = tokens(torch.randn(2, 1 + GRID**2, WIDTH))
    kind, (unet, vae, scheduler) = loss.kind, (loss.unet, loss.vae, painter(loss.kind)[2])
    torch.manual_seed(3)
    with torch.no_grad():
        latents = vae.encode(pictures * 2 - 1).latent_dist.sample() * vae.config.scaling_factor
    noise, steps = torch.randn_like(latents), torch.tensor([200, 731])
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    said = unet(scheduler.add_noise(latents, noise, steps), steps, loss.condition_projection(q)).sample
    wanted = F.mse_loss(said, target)
    drawn = torch.tensor([0, 885])  # mapped to 200 and 731
    torch.manual_seed(3)
    for mask in (None, torch.ones(2, 1, 5, 5)):
        torch.manual_seed(3)
        assert torch.allclose(loss(pictures, q, mask, timesteps=drawn, noise=noise), wanted, rtol=1e-5)
    assert loss(pictures, q, torch.zeros(2, 1, 8, 8)) == 0


def test_gradients_reach_what_is_trained_and_nothing_else(eye):
    loss, encoder, tokens, pictures = eye
    nn.init.normal_(loss.condition_projection.weight)  # its own start is so small that gradients behind it underflow
    frozen = {k: v.clone() for part in (loss.unet, loss.vae) for k, v in part.state_dict().items()}
    seen = tokens(encoder(torch.randn(2, 1 + GRID**2, 9)), torch.ones(2, 1, GRID, GRID))
    loss(pictures, seen).backward()
    assert encoder.weight.grad.abs().sum() > 0
    for module in (tokens.project, tokens.resampler.layers[0].cross.key, loss.condition_projection):
        assert module.weight.grad.abs().sum() > 0
    assert tokens.resampler.queries.grad.abs().sum() > 0
    for part in (loss.unet, loss.vae):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())
        assert not part.training
    loss.train()
    assert not any(module.training for part in (loss.unet, loss.vae) for module in part.modules())
    after = {k: v for part in (loss.unet, loss.vae) for k, v in part.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in frozen.items())


def test_an_empty_region_gives_zero_gradients(eye):
    loss, encoder, tokens, pictures = eye
    loss(pictures, tokens(encoder(torch.randn(2, 1 + GRID**2, 9))), torch.zeros(2, 1, 8, 8)).backward()
    assert not encoder.weight.grad.any()
    assert encoder.weight.grad.isfinite().all()


def test_pictures_are_encoded_in_small_batches():
    unet, vae, scheduler = painter()
    loss = DiffusionFeedbackLoss(unet, vae, scheduler, nn.Linear(24, 12), vae_batch=2)
    sizes, encode = [], vae.encode
    vae.encode = lambda x: sizes.append(len(x)) or encode(x)
    assert loss.latents(torch.rand(5, 3, SIDE, SIDE)).shape == (5, 4, 8, 8)
    assert sizes == [2, 2, 1]


def test_what_does_not_fit_is_refused():
    unet, vae, scheduler = painter()
    with pytest.raises(ModelError, match="gives 24 numbers a token, the UNet reads 12"):
        DiffusionFeedbackLoss(unet, vae, scheduler, nn.Linear(24, 24))
    with pytest.raises(ModelError, match="prediction_type='sample'"):
        DiffusionFeedbackLoss(unet, vae, painter("sample")[2], nn.Linear(24, 12))
    with pytest.raises(ModelError, match="alphas_cumprod"):
        DiffusionFeedbackLoss(unet, vae, object(), nn.Linear(24, 12))
    with pytest.raises(InputError, match="10 tokens given: a class token and 4 x 4"):
        SETTINGS.tokens(WIDTH, GRID)(torch.randn(1, 10, WIDTH))
    with pytest.raises(InputError, match="multiple of 4"):
        SETTINGS.tokens(18, GRID)
    with pytest.raises(ParameterError, match="does not divide"):
        Resampler(5, 24, 8, heads=5)
    with pytest.raises(ParameterError, match="spread"):
        DEEM(spread=1.5)


# -- test-time adaptation -----------------------------------------------------------------------------------------------


def test_adapting_puts_everything_back(eye):
    loss, encoder, tokens, pictures = eye
    nn.init.normal_(loss.condition_projection.weight)
    eyes, given = nn.ModuleList([encoder, tokens]).eval(), torch.randn(1, 1 + GRID**2, 9)
    before = {k: v.clone() for k, v in eyes.state_dict().items()}
    picture, noise = pictures[:1].expand(9, -1, -1, -1), torch.randn(9, 4, 8, 8)
    latents = loss.latents(picture)

    def loss_of(steps):
        seen = tokens(encoder(given)).expand(9, -1, -1)
        return loss(picture, seen, timesteps=steps, latents=latents, noise=noise)

    with torch.no_grad(), adapted(eyes, loss_of, steps=8, lr=1e-3) as losses:
        assert len(losses) == 8
        assert losses[-1] < losses[0]
        assert not torch.equal(encoder.weight, before["0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in eyes.state_dict().items())

    def interrupted():
        with adapted(eyes, loss_of, steps=1, lr=1e-3):
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(torch.equal(v, before[k]) for k, v in eyes.state_dict().items())
    with pytest.raises(ParameterError, match="nothing to adapt"), adapted(loss.unet, loss_of):
        pass


def test_stratified_time_steps():
    for start in (0, 110):
        found = stratified_timesteps(9, start)
        assert len(found) == 9
        assert (found.diff() == 111).all()
        assert found.max() <= 999
