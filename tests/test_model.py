"""model.py: what must be true of the UNet, of its conditioning and of the diffusion."""

import math

import pytest
import torch
import torch.nn.functional as F

import sample
from model import (
    TIMESTEPS,
    Attention,
    GroupNorm,
    NovelViewModel,
    UNet,
    amalgamate,
    condition_dropout,
    noise_schedule,
    pose_features,
    predicted_x0_eps,
    prediction_loss,
    q_sample,
    resize_matrix,
    sample_timesteps,
    timestep_density,
)

SMALL = {
    "in_channels": 6,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "num_heads": 4,
    "context_dim": 16,
    "feature_dim": 12,
    "feature_tokens": 16,
    "latent_size": 8,
}


def randomised(model):
    """The model with random parameters: layers that are zero would hide what they are fed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator)
                / max(1, parameter[0].numel()) ** 0.5
            )
    return model


def small_model(**changes):
    return randomised(NovelViewModel(cls_dim=16, **(SMALL | changes)))


def small_condition(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"latent": (3, 8, 8), "cls": (16,), "pose": (4,), "patch": (16, 12)}
    return {key: torch.randn(batch, *shape, generator=generator) for key, shape in shapes.items()}


def test_default_unet_is_stable_diffusion_with_eight_input_channels():
    with torch.device("meta"):
        unet = UNet()
    assert sum(p.numel() for p in unet.parameters()) == 859_532_484
    shapes = {name: tuple(p.shape) for name, p in unet.state_dict().items()}
    assert shapes["input_blocks.0.0.weight"] == (320, 8, 3, 3)
    assert shapes["input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight"] == (1280, 768)
    assert shapes["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert len(shapes) == 686


def test_one_token_cross_attention_is_the_softmax_one():
    torch.manual_seed(0)
    attention = Attention(32, num_heads=4, context_dim=16).double()
    x, context = torch.randn(2, 9, 32).double(), torch.randn(2, 1, 16).double()
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    q, k, v = (y.reshape(2, -1, 4, 8).transpose(1, 2) for y in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    full = attention.to_out((weights @ v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(attention.one_token(context).expand_as(full), full)


def test_what_the_one_token_shortcut_skips_is_not_trained():
    frozen = {name for name, p in UNet(**SMALL).named_parameters() if not p.requires_grad}
    assert frozen and all(
        "norm2" in name or "attn2.to_q" in name or "attn2.to_k" in name for name in frozen
    )
    model = small_model()
    condition = small_condition()
    model(torch.randn(4, 3, 8, 8), torch.arange(4), condition).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_group_norm_keeps_channels_last_memory_and_precision():
    torch.manual_seed(0)
    x = 300 + torch.randn(2, 64, 5, 5)
    norm = GroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    ours = norm(x.contiguous(memory_format=torch.channels_last))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(ours.double(), exact, atol=1e-3, rtol=0)  # PyTorch's: 8e-2


def test_every_convolution_sees_channels_last_memory():
    model = small_model().to(memory_format=torch.channels_last)
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_pre_hook(
                lambda _, inputs: seen.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    model(torch.randn(4, 3, 8, 8), torch.arange(4), small_condition())
    assert len(seen) > 10 and all(seen)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_amalgamation_is_a_projection_and_a_resize(size):
    torch.manual_seed(0)
    features, weight = torch.randn(2, 64, 12), torch.randn(5, 12)
    ours = amalgamate(features, weight, resize_matrix(8, size))
    grid = F.linear(features, weight).transpose(1, 2).unflatten(2, (8, 8))
    mode = {"mode": "bilinear", "align_corners": False}
    if size <= 8:
        mode = {"mode": "area"}
    torch.testing.assert_close(ours, F.interpolate(grid, size=(size, size), **mode))


def test_area_resize_counts_every_token_alike():
    torch.testing.assert_close(resize_matrix(16, 4).sum(0), torch.full((256,), 1 / 16))


def test_zero_features_add_exactly_zero_and_others_do_not():
    model, condition = small_model(), small_condition()
    x, t = torch.randn(4, 3, 8, 8), torch.arange(4)
    context = torch.randn(4, 1, 16)
    latent_pair = torch.cat([x, condition["latent"]], 1)
    without = model.unet(latent_pair, t, context, None)
    assert torch.equal(model.unet(latent_pair, t, context, torch.zeros(4, 16, 12)), without)
    assert not torch.allclose(model.unet(latent_pair, t, context, condition["patch"]), without)


def test_a_fresh_amalgamation_leaves_the_pretrained_function_as_it_is():
    with_features, without = UNet(**SMALL), UNet(**SMALL | {"feature_dim": 0})
    randomised(without)
    with_features.load_state_dict(without.state_dict(), strict=False)
    x, t, context = torch.randn(2, 6, 8, 8), torch.arange(2), torch.randn(2, 1, 16)
    assert torch.equal(with_features(x, t, context, torch.randn(2, 16, 12)), without(x, t, context))


def test_nulls_of_training_are_the_nulls_of_sampling():
    """Dropped conditions equal zero context, features and latent; guidance uses the same."""
    model, condition = small_model(), small_condition()
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 500)
    none = torch.zeros(4, dtype=torch.bool)
    dropped = model(x, t, condition, keep_context=none, keep_latent=none)
    torch.testing.assert_close(
        dropped, model.unet(torch.cat([x, 0 * x], 1), t, torch.zeros(4, 1, 16), None)
    )
    kept = model(x, t, condition)
    torch.testing.assert_close(model(x, t, condition, keep_context=~none, keep_latent=~none), kept)
    guided_eps = sample.guided_prediction(model, x, t, condition, scale=3.0)[1]
    torch.testing.assert_close(guided_eps, dropped + 3 * (kept - dropped))


def test_every_condition_moves_the_output():
    model, condition = small_model(), small_condition()
    x, t = torch.randn(4, 3, 8, 8), torch.arange(4)
    reference = model(x, t, condition)
    for key, value in condition.items():
        assert not torch.allclose(model(x, t, condition | {key: value + 1}), reference), key


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = small_model(checkpointing=checkpointing).train()
        torch.manual_seed(0)
        model(
            torch.randn(4, 3, 8, 8), torch.arange(4), small_condition()
        ).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_condition_dropout_shares():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    keep_context, keep_latent = condition_dropout(u, 0.05)
    assert (~keep_context).double().mean() == pytest.approx(0.10)
    assert (~keep_latent).double().mean() == pytest.approx(0.10)
    assert (~keep_context & ~keep_latent).double().mean() == pytest.approx(0.05)


# --------------------------------------------------------------------------------------- diffusion

SETTINGS = [("uniform", 0, 1)] + [("gaussian", mean, 200) for mean in (1000, 700, 500, 300, 0)]
SETTINGS += [("gaussian", 1000, std) for std in (100, 300, 400, 500)]


@pytest.mark.parametrize("sampling, mean, std", SETTINGS)
def test_timesteps_follow_their_density(sampling, mean, std):
    """Chi-square over 50 bins of 100,000 draws, for every setting of figures 2 and 6."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = (
        sample_timesteps(u, sampling, mean, std)
        .bincount(minlength=TIMESTEPS)
        .double()
        .reshape(50, 20)
        .sum(1)
    )
    expected = 100_000 * timestep_density(sampling, mean, std).reshape(50, 20).sum(1)
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (counts, expected))
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    assert chi2 < len(counts) + 4 * math.sqrt(2 * len(counts))
    assert timestep_density(sampling, mean, std).sum() == pytest.approx(1)


def test_gaussian_density_by_hand():
    """At mean 1000 and std 200 it is a half-normal; its last 200 steps hold erf(1 / sqrt 2)."""
    density = timestep_density("gaussian", 1000, 200)
    assert density[800:].sum() == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-5)
    assert density[:400].sum() == pytest.approx(0.0027, rel=0.01)
    extremes = sample_timesteps(torch.tensor([0.0, 1 - 2**-53]), "gaussian", 1000, 200)
    assert extremes.tolist() == [0, 999]


def test_schedules():
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    eps = noise_schedule("eps")
    assert eps[0] == pytest.approx(1 - betas[0]) and eps[1] == pytest.approx(
        (1 - betas[0]) * (1 - betas[1])
    )
    assert eps[-1].sqrt() == pytest.approx(0.068, abs=5e-4)
    v = noise_schedule("v")
    assert torch.equal(v, noise_schedule("x0"))
    assert v[-1] == 0 and v[0] == pytest.approx(eps[0]) and (v.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_prediction_and_loss_agree(prediction):
    """The output with zero loss is the one from which the true x0 and noise are read back."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 10, 500, 900, 998])
    alpha_bar = noise_schedule(prediction)
    alpha, sigma = (
        alpha_bar[t].sqrt()[:, None, None, None],
        (1 - alpha_bar[t]).sqrt()[:, None, None, None],
    )
    output = {"eps": noise, "v": alpha * noise - sigma * x0, "x0": x0}[prediction]
    assert prediction_loss(output, x0, noise, t, alpha_bar, prediction).abs().max() < 1e-10
    wrong = (
        1 if prediction == "x0" else 2
    )  # in x0: as 1 / sigma in v, and at the cleanest steps as 10**0.5
    expected = [10, 10, *(1 / sigma.flatten()[2:] ** 2).tolist()] if prediction == "x0" else 5 * [4]
    assert prediction_loss(
        output + wrong, x0, noise, t, alpha_bar, prediction
    ).tolist() == pytest.approx(expected, 1e-4)
    back_x0, back_noise = predicted_x0_eps(
        output, q_sample(x0, t, noise, alpha_bar), t, alpha_bar, prediction
    )
    torch.testing.assert_close(back_x0, x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back_noise, noise, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- --pose_embedding mlp


def pose_models():
    """(token, mlp) with the same seed."""
    models = []
    for pose_embedding in ("token", "mlp"):
        torch.manual_seed(0)
        models.append(NovelViewModel(cls_dim=16, pose_embedding=pose_embedding, **SMALL))
    return models


def test_pose_features_are_sines_and_cosines_of_multiples():
    pose = torch.tensor([[0.3, 0.8, -0.6, 0.1]])
    features = pose_features(pose)
    assert features.shape == (1, 36)
    assert torch.equal(features[:, :4], pose)
    angles = torch.cat([pose, 2 * pose, 4 * pose, 8 * pose], dim=1)
    torch.testing.assert_close(features[:, 4:], torch.cat([angles.sin(), angles.cos()], dim=1))


def test_the_pose_mlp_starts_as_nothing_and_leaves_all_else_as_it_was():
    token, mlp = pose_models()
    weights = mlp.state_dict()
    for name, value in token.state_dict().items():
        assert torch.equal(value, weights[name]), name
    mlp.load_state_dict(randomised(token).state_dict(), strict=False)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 300, 700, 999])
    assert torch.equal(token(x, t, small_condition()), mlp(x, t, small_condition()))


def test_the_pose_mlp_adds_nothing_where_the_context_is_dropped():
    token, mlp = (randomised(model) for model in pose_models())
    token.load_state_dict(
        {k: v for k, v in mlp.state_dict().items() if not k.startswith("pose_mlp.")}
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 300, 700, 999])
    keep = torch.tensor([True, False, True, False])
    plain = token(x, t, small_condition(), keep)
    with_pose = mlp(x, t, small_condition(), keep)
    torch.testing.assert_close(with_pose[~keep], plain[~keep])
    assert (with_pose[keep] - plain[keep]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_another_pose_embedding_is_refused():
    with pytest.raises(ValueError, match="token or mlp"):
        NovelViewModel(cls_dim=16, pose_embedding="rays", **SMALL)


def test_another_pose_encoding_is_refused():
    with pytest.raises(ValueError, match="zero123 or elevation"):
        NovelViewModel(cls_dim=16, pose_encoding="rays", **SMALL)
