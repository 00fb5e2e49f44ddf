"""Everything that trains, in the order in which the method is easiest to learn.

Efficient-3DiM (Jiang et al., ICLR 2024) finetunes a latent diffusion UNet so that, given the latent of one view of an
object and a relative camera move, it predicts the noise in the latent of the other view:

    timestep, pose      how time and the camera move become vectors
    amalgamation        how the patch features of a frozen DINOv2 enter the UNet's encoder (section 3.3)
    UNet                Stable Diffusion's, under LDM's parameter names: a Stable Diffusion checkpoint is its state dict
    NovelViewModel      UNet + `cc_projection`, which turns [CLS] and pose into the UNet's one context token
    diffusion           noise schedule, Gaussian timestep sampling (section 3.2), q(x_t | x_0), the loss (equation 2)

Shapes: B batch, C latent channels, H W latent size, N = H W positions, T patch tokens, K their width, D context width.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIMESTEPS = 1000

# ----------------------------------------------------------------------------------------------- timestep and pose


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps t (B,) -> (B, dim), cosines first, float32 (LDM's)."""
    half = dim // 2
    freqs = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def make_cc_projection(cls_dim: int, context_dim: int) -> nn.Linear:
    """Zero-1-to-3's linear map from [CLS, pose] (B, cls_dim + 4) to the context token (B, context_dim).

    Where the widths agree it starts as the identity on CLS, so that the token is at first what Stable Diffusion image
    variations was trained on, but for the pose's share: its columns keep PyTorch's default initialisation.
    """
    linear = nn.Linear(cls_dim + 4, context_dim)
    if cls_dim == context_dim:
        with torch.no_grad():
            linear.weight[:, :cls_dim] = torch.eye(cls_dim)
            linear.bias.zero_()
    return linear


# ---------------------------------------------------------------------------------------- amalgamation (section 3.3)


def resize_matrix(grid: int, size: int) -> Tensor:
    """The fixed linear map (size², grid²) that resizes a grid of tokens: area when shrinking, bilinear when growing.

    As a constant matrix it is deterministic, and stays out of the backward pass.
    """
    basis = torch.eye(grid * grid).reshape(-1, 1, grid, grid)
    if size <= grid:
        resized = F.interpolate(basis, size=(size, size), mode="area")
    else:
        resized = F.interpolate(basis, size=(size, size), mode="bilinear", align_corners=False)
    return resized.reshape(grid * grid, size * size).T.contiguous()


def amalgamate(features: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    """Patch features for one stage of the UNet's encoder (section 3.3): project, and resize to the stage's size.

    features (B, T, K), weight (C, K), matrix (N, T) -> (B, C, H, W), a view of channels-last memory. The two linear
    maps commute; they run in the order that projects fewer tokens. Zero features give exactly zero: there is no bias.

    Section 3.3 says that features are concatenated, converted by one linear layer, interpolated and added. Ours are:
    where (at a stage's entry, before its skip), how to resize, no bias, a part of the layer a stage, zero at first.
    """
    size = math.isqrt(matrix.shape[0])
    if matrix.shape[0] < matrix.shape[1]:
        tokens = F.linear(matrix @ features, weight)
    else:
        tokens = matrix @ F.linear(features, weight)
    return tokens.transpose(1, 2).unflatten(2, (size, size))


# ------------------------------------------------------------------------------------------------------------- UNet


class GroupNorm(nn.GroupNorm):
    """GroupNorm that leaves channels-last memory as it is, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        return channels_last_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def channels_last_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`F.group_norm` for the compiler: PyTorch's CUDA kernel returns NCHW memory, and every convolution behind it would
    then copy, in backward too.

    The moments are taken of each channel, over positions, and then put together: sums run along contiguous memory, and
    backward needs only one pass of them, which serves weight, bias and input alike.
    """
    B, C, H, W = x.shape
    y = x.permute(0, 2, 3, 1).reshape(B, H * W, C).float()
    var, mean = (
        moment.unflatten(1, (groups, -1)) for moment in torch.var_mean(y, dim=1, correction=0)
    )
    between, mean = torch.var_mean(
        mean, dim=2, keepdim=True, correction=0
    )  # of a group's channels: (B, groups, 1)
    scale = torch.rsqrt(var.mean(dim=2, keepdim=True) + between + eps) * weight.unflatten(
        0, (groups, -1)
    )
    shift = bias.unflatten(0, (groups, -1)) - mean * scale  # (B, groups, C / groups)
    y = y * scale.reshape(B, 1, C) + shift.reshape(B, 1, C)
    return y.to(x.dtype).reshape(B, H, W, C).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding added in between: x (B, C, H, W), emb (B, E) -> (B, C', H, W)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),  # LDM's dropout of 0 keeps its place in the parameter names
            zero_init(
                nn.Conv2d(out_channels, out_channels, 3, padding=1)
            ),  # a block starts as its skip connection
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        emb = self.emb_layers(emb)
        emb = emb + conv.bias.to(
            emb.dtype
        )  # by itself the bias, and its gradient, would take a pass over all of h
        h = F.conv2d(silu(norm(x)), conv.weight, padding=1) + emb[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention's parameters under LDM's names, and self attention over x (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        # one matrix product instead of three; the parameters stay separate, as checkpoints have them
        qkv = F.linear(x, torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]))
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(
            2, 0, 3, 1, 4
        )  # (B, heads, N, ·)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))

    def one_token(self, context: Tensor) -> Tensor:
        """Cross attention to a single context token (B, 1, D) -> (B, 1, C), exact and without a softmax.

        A softmax over one key is 1 whatever the query: every position receives to_out(to_v(context)).
        """
        return self.to_out(self.to_v(context))


class GEGLU(nn.Module):
    """Gated linear unit: x (B, N, C) -> (B, N, C')."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


def feed_forward(dim: int) -> nn.Module:
    net = nn.Sequential(
        GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)
    )  # 1: LDM's dropout of 0
    return nn.Sequential(OrderedDict(net=net))


class TransformerBlock(nn.Module):
    """Self attention, cross attention to the context token, feed-forward: x (B, N, C), context (B, 1, D)."""

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(dim, num_heads)
        self.ff = feed_forward(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        # Deviation: with one context token these get no gradient, so they are kept for checkpoints and not trained;
        # AdamW's weight decay would otherwise shrink them.
        for unused in (self.norm2, self.attn2.to_q, self.attn2.to_k):
            unused.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2.one_token(context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map: x (B, C, H, W), context (B, 1, D) -> (B, C, H, W)."""

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
        # In channels-last memory tokens are a view, and the 1x1 convolutions are linear layers over them.
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # (B, N, C)
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        h = self.transformer_blocks[0](h, context)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


def downsample(channels: int) -> nn.Module:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class NearestUpsample(nn.Module):
    """nn.Upsample(scale_factor=2), x (B, C, H, W) -> (B, C, 2H, 2W), by an expanded view: its backward is a sum, where
    the compiler makes nn.Upsample's of atomic additions, which are slow and come in any order."""

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
        return x.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


def upsample(channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(up=NearestUpsample(), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


class Block(nn.Sequential):
    """A step of the UNet: its layers in turn, each given what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters zero: what it adds is nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class UNet(nn.Module):
    """Stable Diffusion's UNet (LDM's names; the defaults are SD 1.x with Zero-1-to-3's 8 input channels).

    Args:
        model_channels, channel_mult: channels of stage s are model_channels * channel_mult[s]; multiples of 32.
        num_res_blocks: residual blocks a stage in the encoder, one more in the decoder.
        attention_resolutions: downsampling factors at which transformers follow the residual blocks.
        feature_dim: width K of the patch features to amalgamate; 0 leaves the amalgamation out.
        feature_tokens: number T of patch tokens, a square; latent_size: H = W. Both serve the amalgamation only.
        checkpointing: recompute each block in backward; saves memory, costs about a third more time.
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
                f"model_channels {model_channels} must be a multiple of 32 and of num_heads {num_heads}"
            )
        if latent_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"a latent of {latent_size} cannot be halved {len(channel_mult) - 1} times"
            )
        self.model_channels, self.context_dim, self.feature_dim = (
            model_channels,
            context_dim,
            feature_dim,
        )
        self.checkpointing = checkpointing
        emb_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )

        def block(channels: int, out: int, factor: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, emb_dim, out)]
            if factor in attention_resolutions:
                layers.append(SpatialTransformer(out, num_heads, context_dim))
            return layers

        # encoder; a stage is entered behind conv_in, or behind a downsampling
        channels = model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skip_channels, self.stage_entry, stage_channels = [channels], [0], [channels]
        for stage, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Block(*block(channels, mult * model_channels, 2**stage)))
                channels = mult * model_channels
                skip_channels.append(channels)
            if stage < len(channel_mult) - 1:
                self.stage_entry.append(len(self.input_blocks))
                self.input_blocks.append(Block(downsample(channels)))
                skip_channels.append(channels)
                stage_channels.append(channels)

        self.middle_block = Block(
            ResBlock(channels, emb_dim, channels),
            SpatialTransformer(channels, num_heads, context_dim),
            ResBlock(channels, emb_dim, channels),
        )

        # decoder
        self.output_blocks = nn.ModuleList()
        for stage, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = block(channels + skip_channels.pop(), mult * model_channels, 2**stage)
                channels = mult * model_channels
                if stage and i == num_res_blocks:
                    layers.append(upsample(channels))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            GroupNorm(32, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

        if feature_dim:
            grid = math.isqrt(feature_tokens)
            if grid * grid != feature_tokens:
                raise ValueError(f"{feature_tokens} patch tokens are not a square grid")
            self.stage_channels = stage_channels
            # The paper's single linear layer; its rows are split over the stages. Zero at first, so that finetuning
            # starts from the pretrained function; no bias, so that zero features are the null condition.
            self.amalgamation = zero_init(nn.Linear(feature_dim, sum(stage_channels), bias=False))
            for stage in range(len(channel_mult)):
                matrix = resize_matrix(grid, latent_size // 2**stage)
                self.register_buffer(f"resize_{stage}", matrix, persistent=False)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, features: Tensor | None = None
    ) -> Tensor:
        """The network's output (B, out_channels, H, W), by training either noise or v.

        x (B, in_channels, H, W): noisy target latent beside the condition's latent; t (B,): timesteps in [0, 1000);
        context (B, 1, D): the context token; features (B, T, K): patch features, or None to amalgamate nothing.
        """
        assert context.shape[1] == 1, f"one context token expected, got {context.shape[1]}"
        emb = timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype)
        emb = self.time_embed(emb)  # (B, 4 model_channels)
        x = x.contiguous(memory_format=torch.channels_last)

        skips = []
        stage = 0
        for i, block in enumerate(self.input_blocks):
            x = self.run(block, x, emb, context)
            if i in self.stage_entry:
                if features is not None:
                    weight = self.amalgamation.weight.split(self.stage_channels)[stage]
                    x = x + amalgamate(features, weight, getattr(self, f"resize_{stage}"))
                stage += 1
            skips.append(x)
        x = self.run(
            self.middle_block, x, emb, context
        )  # (B, C_last, H / 2^(stages-1), W / 2^(stages-1))
        for block in self.output_blocks:
            x = self.run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    def run(self, block: Block, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, use_reentrant=False)
        return block(x, emb, context)


# --------------------------------------------------------------------------------------------------- the whole model


class NovelViewModel(nn.Module):
    """C(x_hat, R, T) and eps_theta of equation 2: conditions in, the target latent's noise (or v) out.

    Args:
        cls_dim: width of the image encoder's [CLS] token (DINOv2 ViT-L/14: 1024; CLIP's embedding: 768).
        prediction: what the output is, "eps" (the paper's; Stable Diffusion's) or, to train from scratch, "v" or "x0".
            A network narrower than its input has no room for the noise that eps and v hold; images are simpler (Li &
            He 2025, "Back to Basics: Let Denoising Generative Models Denoise").
        unet: the UNet's arguments.
    """

    def __init__(self, cls_dim: int = 1024, prediction: str = "eps", **unet):
        super().__init__()
        self.args = dict(
            cls_dim=cls_dim, prediction=prediction, **unet
        )  # what a checkpoint needs to rebuild it
        self.prediction = prediction
        # before the UNet, so that its random part is the same with and without amalgamation
        self.cc_projection = make_cc_projection(cls_dim, unet.get("context_dim", 768))
        self.unet = UNet(**unet)
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

        condition: "latent" (B, C, H, W), the condition view's, unscaled where x_t is scaled by the codec's factor (a
        quirk of Zero-1-to-3's that its checkpoints need); "cls" (B, cls_dim); "pose" (B, 4), the camera move; "patch"
        (B, T, K), unless the model amalgamates nothing. keep_context, keep_latent (B,) bool: False puts the null in
        place of (context and features, condition latent) for classifier-free guidance.
        """
        latent = condition["latent"]
        context = self.cc_projection(torch.cat([condition["cls"], condition["pose"]], dim=1))[
            :, None
        ]  # (B, 1, D)
        patch = condition["patch"] if self.unet.feature_dim else None
        # Deviation: the null context is zeros behind the projection, in training as in sampling; Zero-1-to-3 trains
        # with a zero CLS that keeps its pose and samples with zeros.
        if keep_context is not None:
            context = context * keep_context[:, None, None]
            patch = patch * keep_context[:, None, None] if patch is not None else None
        if keep_latent is not None:
            latent = latent * keep_latent[:, None, None, None]
        return self.unet(torch.cat([x_t, latent], dim=1), t, context, patch)


# -------------------------------------------------------------------------------------------------------- diffusion


def noise_schedule(prediction: str = "eps") -> Tensor:
    """alpha_bar (1000,) float32, where x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (LDM's betas).

    Stable Diffusion's last step still holds .068 of the image, though sampling starts from pure noise. Finetuning must
    live with that. Training from scratch need not: on small, mostly white images the wrong mean shows as dark samples.
    Deviation: predicting v or x0, which stay defined there, sqrt(alpha_bar) is shifted and scaled to end at exactly
    zero and start unchanged (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", 3.1).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if prediction in ("v", "x0"):
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    elif prediction != "eps":
        raise ValueError(f"prediction is eps, v or x0, not {prediction!r}")
    return (root**2).float()


def timestep_density(sampling: str, mean: float = 1000.0, std: float = 200.0) -> Tensor:
    """P(t) (1000,) float64 of `sample_timesteps` (figure 2): each t holds the density's integral over [t, t + 1)."""
    if sampling == "uniform":
        return torch.full((TIMESTEPS,), 1 / TIMESTEPS, dtype=torch.float64)
    cdf = torch.special.ndtr((torch.arange(TIMESTEPS + 1, dtype=torch.float64) - mean) / std)
    return cdf.diff() / (cdf[-1] - cdf[0])


def sample_timesteps(u: Tensor, sampling: str, mean: float = 1000.0, std: float = 200.0) -> Tensor:
    """Timesteps (B,) int64 in [0, 1000) from u (B,) uniform on [0, 1) in float64, by inverse CDF (section 3.2).

    "gaussian": a normal(mean, std), renormalised so that its density integrates to 1 on [0, 1000]. At the paper's 1000
    and 200 P(t < 400) is 0.3%: this presumes a pretrained UNet, which already knows the late, nearly clean steps.
    """
    if sampling == "uniform":
        x = u.double() * TIMESTEPS
    else:
        low, high = torch.special.ndtr(
            (torch.tensor([0.0, TIMESTEPS], dtype=torch.float64) - mean) / std
        ).tolist()
        x = mean + std * torch.special.ndtri(low + u.double() * (high - low))
    return x.floor().long().clamp(0, TIMESTEPS - 1)


def condition_dropout(u: Tensor, p: float = 0.05) -> tuple[Tensor, Tensor]:
    """Zero-1-to-3's condition dropout, from u (B,) uniform on [0, 1): (keep_context, keep_latent), (B,) bool each.

    u < 2p drops the context, p <= u < 3p the condition latent: both in a share p of the samples, each alone in p.
    """
    return u >= 2 * p, (u < p) | (u >= 3 * p)


def schedule_at(alpha_bar: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), each (B, 1, 1, 1): the paper's alpha_t and sigma_t."""
    ab = alpha_bar[t][:, None, None, None]
    return ab.sqrt(), (1 - ab).sqrt()


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """q(x_t | x_0) with the given noise (section 3.1): x0 and noise (B, C, H, W), t (B,) -> (B, C, H, W)."""
    alpha, sigma = schedule_at(alpha_bar, t)
    return alpha * x0 + sigma * noise


def predicted_x0_eps(output: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str):
    """(x0, eps) that the model's output implies, each (B, C, H, W) float32: equation 3's "predicted x0" and F."""
    alpha, sigma = schedule_at(alpha_bar, t)
    output, x_t = output.float(), x_t.float()
    if prediction == "x0":
        return output, (x_t - alpha * output) / sigma
    if prediction == "v":
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t
    return (x_t - sigma * output) / alpha, output


def diffusion_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str
) -> Tensor:
    """Equation 2 with w(t) = 1, a value a sample: the squared error in the noise (or in v), its mean over C, H, W.

    With x0 prediction it is v's, too, x0's over sigma², but for nearly clean steps, which would outweigh all others.
    """
    alpha, sigma = schedule_at(alpha_bar, t)
    if prediction == "x0":
        weight = 1 / sigma.square().clamp(min=0.1)
        return (weight * (output.float() - x0).square()).mean(dim=(1, 2, 3))
    target = alpha * noise - sigma * x0 if prediction == "v" else noise
    return (output.float() - target).square().mean(dim=(1, 2, 3))
