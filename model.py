"""Everything that trains, in the order in which the method is easiest to learn.

Efficient-3DiM (Jiang et al., ICLR 2024) finetunes Stable Diffusion's UNet. Given the latent of one
view of an object and a relative camera move, it predicts the noise in the latent of the other view.
The sections of this file:

    diffusion         noise schedule, Gaussian timesteps (section 3.2), q(x_t | x_0), equation 2
    pose and context  how the camera move and DINOv2's [CLS] token reach the UNet (section 3.3)
    amalgamation      how DINOv2's patch features enter the UNet's encoder (section 3.3)
    UNet              Stable Diffusion's, under LDM's parameter names
    NovelViewModel    UNet, context and pose together: the network that is trained and sampled

Shapes: B batch, C latent channels, H W latent size, N = H W positions, T patch tokens, K their
width, D width of the context token, E width of the timestep embedding.
"""

import contextlib
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIMESTEPS = 1000

# --------------------------------------------------------------------------- diffusion (3.1, 3.2)


def noise_schedule(prediction: str = "eps") -> Tensor:
    """alpha_bar (1000,) float32: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    The betas are Stable Diffusion's. At t = 999 x_t still holds 0.068 of the image, but sampling
    starts from pure noise. On small, mostly white images this mismatch shows as dark samples.
    Finetuning has to keep the schedule of the pretrained UNet. Training from scratch can change it.
    Deviation: for v and x0 prediction sqrt(alpha_bar) is shifted and scaled. It starts unchanged
    and ends at exactly zero (Lin et al. 2024, "Common Diffusion Noise Schedules and
    Sample Steps are Flawed", section 3.1). With eps prediction x_0 would be undefined there.
    """
    if prediction not in ("eps", "v", "x0"):
        raise ValueError(f"prediction is eps, v or x0, not {prediction!r}")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if prediction != "eps":
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).float()


def timestep_density(sampling: str, mean: float = 1000.0, std: float = 200.0) -> Tensor:
    """P(t) (1000,) float64 of `sample_timesteps` (figure 2): the density over [t, t + 1)."""
    if sampling == "uniform":
        return torch.full((TIMESTEPS,), 1 / TIMESTEPS, dtype=torch.float64)
    edges = torch.arange(TIMESTEPS + 1, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - mean) / std)
    return cdf.diff() / (cdf[-1] - cdf[0])


def sample_timesteps(u: Tensor, sampling: str, mean: float = 1000.0, std: float = 200.0) -> Tensor:
    """Timesteps (B,) int64 in [0, 1000) from u (B,), uniform on [0, 1) in float64 (section 3.2).

    "uniform" is DDPM's. "gaussian" draws from a normal(mean, std), renormalised so that its density
    integrates to 1 on [0, 1000], by its inverse CDF. With the paper's mean 1000 and std 200,
    P(t < 400) is 0.3%: it presumes a pretrained UNet, which already knows the nearly clean steps.
    """
    if sampling == "uniform":
        x = u.double() * TIMESTEPS
    else:
        ends = torch.tensor([0.0, TIMESTEPS], dtype=torch.float64)
        low, high = torch.special.ndtr((ends - mean) / std).tolist()
        x = mean + std * torch.special.ndtri(low + u.double() * (high - low))
    return x.floor().long().clamp(0, TIMESTEPS - 1)


def schedule_at(alpha_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), (B, 1, 1, 1): the paper's alpha_t, sigma_t."""
    alpha_bar_t = alpha_bar[t][:, None, None, None]
    return alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """q(x_t | x_0) with the given noise (section 3.1): x0, noise (B, C, H, W), t (B,) -> x_t."""
    alpha, sigma = schedule_at(alpha_bar, t)
    return alpha * x0 + sigma * noise


def predicted_x0_eps(
    output: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the network's output implies, each (B, C, H, W) float32 (equation 3)."""
    alpha, sigma = schedule_at(alpha_bar, t)
    output = output.float()
    x_t = x_t.float()
    if prediction == "x0":
        return output, (x_t - alpha * output) / sigma
    if prediction == "v":
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t
    return (x_t - sigma * output) / alpha, output


def prediction_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str
) -> Tensor:
    """The squared error of a network's output, averaged over C, H, W: one value a sample, (B,).

    "eps": the error in the noise (equation 2). "v": the error in v = alpha noise - sigma x0
    (Salimans & Ho 2022). "x0": the error in the image, times 1 / sigma², which equals the v loss.
    This weight is capped at 10, because otherwise the nearly clean steps would dominate.
    """
    alpha, sigma = schedule_at(alpha_bar, t)
    output = output.float()
    if prediction == "x0":
        weight = 1 / sigma.square().clamp(min=0.1)
        error = weight * (output - x0).square()
    elif prediction == "v":
        error = (output - (alpha * noise - sigma * x0)).square()
    else:
        error = (output - noise).square()
    return error.mean(dim=(1, 2, 3))


def training_losses(
    model: nn.Module,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: dict[str, Tensor],
    keep_context: Tensor | None = None,
    keep_latent: Tensor | None = None,
) -> Tensor:
    """Equation 2 with w(t) = 1: the loss of each sample, (B,).

    model: a NovelViewModel, or DDP around one; x0 (B, C, H, W): the target view's latent, scaled;
    t (B,); noise (B, C, H, W); condition, keep_context, keep_latent: see NovelViewModel.forward.
    """
    network = getattr(model, "module", model)  # DDP keeps the model there
    x_t = q_sample(x0, t, noise, network.alpha_bar)
    output = model(x_t, t, condition, keep_context, keep_latent)
    return prediction_loss(output, x0, noise, t, network.alpha_bar, network.prediction)


def condition_dropout(u: Tensor, p: float = 0.05) -> tuple[Tensor, Tensor]:
    """Zero-1-to-3's condition dropout, for classifier-free guidance: which samples keep what.

    u (B,) is uniform on [0, 1). Returns (keep_context, keep_latent), (B,) bool each: the context is
    dropped for u < 2p, the condition latent for p <= u < 3p.
    """
    keep_context = u >= 2 * p
    keep_latent = (u < p) | (u >= 3 * p)
    return keep_context, keep_latent


# --------------------------------------------------------------------------- pose and context (3.3)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps t (B,) -> (B, dim), cosines first, float32 (LDM's)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_cc_projection(cls_dim: int, context_dim: int) -> nn.Linear:
    """Zero-1-to-3's linear map from [CLS, pose] (B, cls_dim + 4) to the context token (B, D).

    Where the two widths agree (CLIP's 768) it starts as the identity on CLS, and only the pose's
    columns keep PyTorch's default initialisation. Elsewhere (DINOv2's 1024) all of it does.
    """
    linear = nn.Linear(cls_dim + 4, context_dim)
    if cls_dim == context_dim:
        with torch.no_grad():
            linear.weight[:, :cls_dim] = torch.eye(cls_dim)
            linear.bias.zero_()
    return linear


POSE_FREQUENCIES = (1, 2, 4, 8)
POSE_FEATURES = 4 * (1 + 2 * len(POSE_FREQUENCIES))


def pose_features(pose: Tensor) -> Tensor:
    """A camera move, with sines and cosines of multiples of its numbers: (B, 4) -> (B, 36)."""
    angles = torch.cat([frequency * pose for frequency in POSE_FREQUENCIES], dim=1)
    return torch.cat([pose, angles.sin(), angles.cos()], dim=1)


def make_pose_mlp(emb_dim: int) -> nn.Sequential:
    """The camera move as part of the timestep embedding: pose features (B, 36) -> (B, E).

    Deviation: beyond the paper, with `--pose_embedding mlp`. In the paper the move is part of the
    context token alone; this lets it modulate every residual block. The last layer is zero at
    first, so that finetuning starts from the pretrained function.
    """
    return nn.Sequential(
        nn.Linear(POSE_FEATURES, emb_dim),
        nn.SiLU(),
        zero_init(nn.Linear(emb_dim, emb_dim)),
    )


def without_autocast(device: torch.device):
    """A block that computes in float32. The "meta" device, which counts FLOPs, has no autocast."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters zero, so that it adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# ------------------------------------------------------------------------------ amalgamation (3.3)


def resize_matrix(grid: int, size: int) -> Tensor:
    """The linear map (size², grid²) that resizes a grid of tokens to size x size.

    It averages areas where the grid shrinks, and is bilinear where the grid grows. The product with
    a constant matrix is deterministic, in backward too; F.interpolate on a GPU is not.
    """
    basis = torch.eye(grid * grid).reshape(-1, 1, grid, grid)
    if size <= grid:
        resized = F.interpolate(basis, size=(size, size), mode="area")
    else:
        resized = F.interpolate(basis, size=(size, size), mode="bilinear", align_corners=False)
    return resized.reshape(grid * grid, size * size).T.contiguous()


def amalgamate(features: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    """Patch features for one stage of the UNet's encoder (section 3.3): project and resize them.

    features (B, T, K): those of several ViT layers, concatenated from shallow to deep; weight
    (C, K): the stage's rows of the paper's single linear layer; matrix (N, T): `resize_matrix`.
    Returns (B, C, H, W). The two linear maps commute, so the projection runs where there are fewer
    tokens. Zero features, the null condition, give exactly zero, because there is no bias.

    The paper names the steps: concatenate, one linear layer, interpolate, add. The rest is our
    choice: the result is added at a stage's entry, before its skip is taken; `resize_matrix`
    resizes; the layer has no bias and is zero at first.
    """
    size = math.isqrt(matrix.shape[0])
    if matrix.shape[0] < matrix.shape[1]:
        tokens = F.linear(matrix @ features, weight)  # (B, N, C)
    else:
        tokens = matrix @ F.linear(features, weight)  # (B, N, C)
    return tokens.transpose(1, 2).unflatten(2, (size, size))


# -------------------------------------------------------------------------------------------- UNet


class GroupNorm(nn.GroupNorm):
    """GroupNorm of x (B, C, H, W) in channels-last memory, which it keeps.

    On a GPU PyTorch's own returns NCHW memory, so the next convolution has to copy. A compiled
    prototype of this one raised training on an H100 from 664 to 681 samples/s. On a CPU PyTorch's
    loses precision in channels-last memory: at mean / std 10 its error is 3.0e-4, and this one's
    is 1.4e-6 (docs/performance.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        groups = self.num_groups
        y = x.permute(0, 2, 3, 1).reshape(B, H * W, groups, C // groups)
        y = y.to(torch.promote_types(y.dtype, torch.float32))  # float32 or better
        var, mean = torch.var_mean(y, dim=(1, 3), keepdim=True, correction=0)  # (B, 1, groups, 1)
        scale = torch.rsqrt(var + self.eps) * self.weight.reshape(groups, C // groups)
        shift = self.bias.reshape(groups, C // groups) - mean * scale
        y = y * scale + shift
        return y.to(x.dtype).reshape(B, H, W, C).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two convolutions, the timestep embedding added between them: x (B, C, H, W), emb (B, E)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(32, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),  # LDM's dropout of 0 keeps its place in the parameter names
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        if channels == out_channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention under LDM's names.

    `forward` is self attention, (B, N, C) -> (B, N, C). `one_token` is cross attention.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        # One matrix product instead of three. The parameters stay apart, as checkpoints have them.
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = F.linear(x, weight)  # (B, N, 3 C)
        qkv = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))

    def one_token(self, context: Tensor) -> Tensor:
        """Cross attention to one context token (B, 1, D) -> (B, 1, C), exact, without a softmax.

        A softmax over one key is 1 for every query, so every position gets to_out(to_v(context)).
        """
        return self.to_out(self.to_v(context))


class GEGLU(nn.Module):
    """Gated linear unit: x (B, N, C) -> (B, N, C')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(dim: int) -> nn.Module:
    net = nn.Sequential(
        GEGLU(dim, 4 * dim),
        nn.Identity(),  # LDM's dropout of 0
        nn.Linear(4 * dim, dim),
    )
    return nn.Sequential(OrderedDict(net=net))


class TransformerBlock(nn.Module):
    """Self attention, cross attention to the context token, feed-forward.

    x (B, N, C), context (B, 1, D) -> (B, N, C).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(dim, num_heads)
        self.ff = feed_forward(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        # Deviation: with one context token these get no gradient. They are kept for checkpoints and
        # not trained, because AdamW's weight decay would shrink them.
        for unused in (self.norm2, self.attn2.to_q, self.attn2.to_k):
            unused.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2.one_token(context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map.

    x (B, C, H, W), context (B, 1, D) -> (B, C, H, W).
    """

    def __init__(self, channels: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, num_heads, context_dim)]
        )
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # In channels-last memory the tokens are a view, and 1x1 convolutions are linear layers.
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # (B, N, C)
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        h = self.transformer_blocks[0](h, context)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


def downsample(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(op=conv))


def upsample(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv))


class Block(nn.Sequential):
    """One entry of the UNet's encoder or decoder: its layers in turn, each given what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Stable Diffusion's UNet under LDM's names, with the amalgamation of section 3.3.

    The defaults are Stable Diffusion 1.x with Zero-1-to-3's 8 input channels.

    Args:
        model_channels, channel_mult: channels of stage s are model_channels * channel_mult[s];
            model_channels is a multiple of 32.
        num_res_blocks: residual blocks a stage in the encoder; the decoder has one more.
        attention_resolutions: downsampling factors at which transformers follow residual blocks.
        feature_dim: width K of the patch features to amalgamate; 0 leaves the amalgamation out.
        feature_tokens: number T of patch tokens, a square number.
        latent_size: H = W of the latents; with feature_tokens it sizes the amalgamation.
        checkpointing: recompute each block in backward; it saves memory and costs time.
    Raises ValueError where these do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (1, 2, 4),
        num_heads: int = 8,
        context_dim: int = 768,
        feature_dim: int = 0,
        feature_tokens: int = 256,
        latent_size: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__()
        if model_channels % 32 or model_channels % num_heads:
            raise ValueError(
                f"model_channels {model_channels} must be a multiple of 32 "
                f"and of num_heads {num_heads}"
            )
        if latent_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"a latent of {latent_size} cannot be halved {len(channel_mult) - 1} times"
            )
        self.model_channels = model_channels
        self.context_dim = context_dim
        self.feature_dim = feature_dim
        self.checkpointing = checkpointing
        self.emb_dim = 4 * model_channels
        self.num_heads = num_heads
        self.attention_resolutions = attention_resolutions

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.emb_dim),
            nn.SiLU(),
            nn.Linear(self.emb_dim, self.emb_dim),
        )
        skip_channels = self.build_encoder(in_channels, channel_mult, num_res_blocks)
        channels = skip_channels[-1]
        self.middle_block = Block(
            ResBlock(channels, self.emb_dim, channels),
            SpatialTransformer(channels, num_heads, context_dim),
            ResBlock(channels, self.emb_dim, channels),
        )
        self.build_decoder(skip_channels, channel_mult, num_res_blocks)
        self.out = nn.Sequential(
            GroupNorm(32, channel_mult[0] * model_channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channel_mult[0] * model_channels, out_channels, 3, padding=1)),
        )
        if feature_dim:
            self.build_amalgamation(feature_tokens, latent_size)

    def layers(self, channels: int, out_channels: int, factor: int) -> list[nn.Module]:
        """A residual block and, at the downsampling factors that have attention, a transformer."""
        layers: list[nn.Module] = [ResBlock(channels, self.emb_dim, out_channels)]
        if factor in self.attention_resolutions:
            layers.append(SpatialTransformer(out_channels, self.num_heads, self.context_dim))
        return layers

    def build_encoder(self, in_channels: int, mult: tuple[int, ...], blocks: int) -> list[int]:
        """Makes `input_blocks`; returns the channels of each one's output, which the decoder takes.

        A stage is entered after conv_in or after a downsampling; `stage_entry` holds the numbers of
        these blocks and `stage_channels` their channels.
        """
        channels = self.model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self.stage_entry = [0]
        self.stage_channels = [channels]
        skip_channels = [channels]
        for stage in range(len(mult)):
            for _ in range(blocks):
                out_channels = mult[stage] * self.model_channels
                self.input_blocks.append(Block(*self.layers(channels, out_channels, 2**stage)))
                channels = out_channels
                skip_channels.append(channels)
            if stage < len(mult) - 1:
                self.stage_entry.append(len(self.input_blocks))
                self.stage_channels.append(channels)
                self.input_blocks.append(Block(downsample(channels)))
                skip_channels.append(channels)
        return skip_channels

    def build_decoder(self, skip_channels: list[int], mult: tuple[int, ...], blocks: int) -> None:
        """Makes `output_blocks`; each takes the output of the block below and one skip."""
        remaining = list(skip_channels)
        channels = remaining[-1]
        self.output_blocks = nn.ModuleList()
        for stage in reversed(range(len(mult))):
            for i in range(blocks + 1):
                out_channels = mult[stage] * self.model_channels
                layers = self.layers(channels + remaining.pop(), out_channels, 2**stage)
                channels = out_channels
                if stage > 0 and i == blocks:
                    layers.append(upsample(channels))
                self.output_blocks.append(Block(*layers))

    def build_amalgamation(self, feature_tokens: int, latent_size: int) -> None:
        """Makes the linear layer of section 3.3, whose rows are split over the stages.

        It is zero at first, so that finetuning starts from the pretrained function.
        """
        grid = math.isqrt(feature_tokens)
        if grid * grid != feature_tokens:
            raise ValueError(f"{feature_tokens} patch tokens are not a square grid")
        rows = sum(self.stage_channels)
        self.amalgamation = zero_init(nn.Linear(self.feature_dim, rows, bias=False))
        for stage in range(len(self.stage_channels)):
            matrix = resize_matrix(grid, latent_size // 2**stage)
            self.register_buffer(f"resize_{stage}", matrix, persistent=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        features: Tensor | None = None,
        pose_emb: Tensor | None = None,
    ) -> Tensor:
        """The network's output (B, out_channels, H, W): noise, v or x0, by what it is trained for.

        x (B, in_channels, H, W): the noisy target latent beside the condition latent; t (B,):
        timesteps in [0, 1000); context (B, 1, D): the context token; features (B, T, K): patch
        features, None to amalgamate nothing; pose_emb (B, E): added to the timestep embedding.
        """
        assert context.shape[1] == 1, f"one context token expected, got {context.shape[1]}"
        emb = timestep_embedding(t, self.model_channels)
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))  # (B, E)
        if pose_emb is not None:
            emb = emb + pose_emb
        x = x.contiguous(memory_format=torch.channels_last)

        skips = []
        for i, block in enumerate(self.input_blocks):
            x = self.run(block, x, emb, context)
            if i in self.stage_entry and features is not None:
                x = x + self.stage_features(features, self.stage_entry.index(i))
            skips.append(x)
        x = self.run(self.middle_block, x, emb, context)  # (B, C', H / 8, W / 8) with 4 stages
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.run(block, x, emb, context)
        return self.out(x)

    def stage_features(self, features: Tensor, stage: int) -> Tensor:
        """What the amalgamation adds at a stage's entry: features (B, T, K) -> (B, C', H', W')."""
        weight = self.amalgamation.weight.split(self.stage_channels)[stage]
        return amalgamate(features, weight, getattr(self, f"resize_{stage}"))

    def run(self, block: Block, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """A block, recomputed in backward where `checkpointing` asks for it."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, use_reentrant=False)
        return block(x, emb, context)


# ---------------------------------------------------------------------------------- the whole model


class NovelViewModel(nn.Module):
    """eps_theta(x_t; t; C(x_hat, R, T)) of equations 2 and 4: conditions in, a prediction out.

    Args:
        cls_dim: width of the image encoder's [CLS] token (DINOv2 ViT-L/14: 1024; CLIP: 768).
        prediction: what the output is: "eps", the noise (the paper's and Stable Diffusion's), or,
            to train from scratch, "v" or "x0". A network narrower than its input has no room for
            the noise that eps and v hold; the image is simpler (Li & He 2025, "Back to Basics: Let
            Denoising Generative Models Denoise").
        pose_encoding: what the four numbers of a camera move are, "zero123" or "elevation"; see
            data.relative_pose.
        pose_embedding: how the camera move enters: "token", in the context token alone (the paper
            and Zero-1-to-3), or "mlp", also in the timestep embedding (ours; see make_pose_mlp).
    UNet's docstring explains all other arguments.
    """

    def __init__(
        self,
        *,
        cls_dim: int = 1024,
        prediction: str = "eps",
        pose_encoding: str = "zero123",
        pose_embedding: str = "token",
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (1, 2, 4),
        num_heads: int = 8,
        context_dim: int = 768,
        feature_dim: int = 0,
        feature_tokens: int = 256,
        latent_size: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__()
        if pose_embedding not in ("token", "mlp"):
            raise ValueError(f"pose_embedding is token or mlp, not {pose_embedding!r}")
        if pose_encoding not in ("zero123", "elevation"):
            raise ValueError(f"pose_encoding is zero123 or elevation, not {pose_encoding!r}")
        unet_args = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "model_channels": model_channels,
            "channel_mult": channel_mult,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": attention_resolutions,
            "num_heads": num_heads,
            "context_dim": context_dim,
            "feature_dim": feature_dim,
            "feature_tokens": feature_tokens,
            "latent_size": latent_size,
            "checkpointing": checkpointing,
        }
        own_args = {
            "cls_dim": cls_dim,
            "prediction": prediction,
            "pose_encoding": pose_encoding,
            "pose_embedding": pose_embedding,
        }
        self.args = {**own_args, **unet_args}  # a checkpoint keeps them, to rebuild the model
        self.prediction = prediction
        self.pose_encoding = pose_encoding
        # Made before the UNet, so that its random weights are the same with and without features.
        self.cc_projection = make_cc_projection(cls_dim, context_dim)
        self.unet = UNet(**unet_args)
        self.pose_mlp = make_pose_mlp(self.unet.emb_dim) if pose_embedding == "mlp" else None
        self.register_buffer("alpha_bar", noise_schedule(prediction), persistent=False)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: dict[str, Tensor],
        keep_context: Tensor | None = None,
        keep_latent: Tensor | None = None,
    ) -> Tensor:
        """x_t (B, C, H, W), t (B,) -> (B, C, H, W).

        condition: "latent" (B, C, H, W), the condition view's (unscaled, although x_t is scaled by
        the codec's factor: Zero-1-to-3's quirk, which its checkpoints need); "cls" (B, cls_dim);
        "pose" (B, 4), the camera move; "patch" (B, T, K), unless nothing is amalgamated.
        keep_context, keep_latent (B,) bool, for classifier-free guidance: where keep_context is
        False, context, features and pose embedding are zero; where keep_latent is False, the
        condition latent is zero.
        """
        cond_latent = condition["latent"]
        context, pose_emb = self.embed_condition(condition["cls"], condition["pose"])
        features = condition["patch"] if self.unet.feature_dim else None
        # Deviation: the null context is zeros after the projection, in training as in sampling.
        # Zero-1-to-3 trains with a zero CLS that keeps its pose, and samples with zeros.
        if keep_context is not None:
            context = context * keep_context[:, None, None]
            if features is not None:
                features = features * keep_context[:, None, None]
            if pose_emb is not None:
                pose_emb = pose_emb * keep_context[:, None]
        if keep_latent is not None:
            cond_latent = cond_latent * keep_latent[:, None, None, None]
        return self.unet(torch.cat([x_t, cond_latent], dim=1), t, context, features, pose_emb)

    def embed_condition(self, cls: Tensor, pose: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context token (B, 1, D), and the pose embedding (B, E) if there is one.

        Whatever the precision, in float32 (on a GPU TF32): bf16 would round the camera move by up
        to 0.45 degrees.
        """
        with without_autocast(cls.device):
            token = self.cc_projection(torch.cat([cls, pose], dim=1).float())
            if self.pose_mlp is None:
                return token[:, None], None
            return token[:, None], self.pose_mlp(pose_features(pose.float()))
