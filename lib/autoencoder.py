"""Stable Diffusion's autoencoder under LDM's names. B batch, C latent channels, f downsampling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cli import InputError, one_line
from lib.formats import PREFIX, count


class VAEBlock(nn.Module):
    """Two convolutions beside a skip connection: (B, c, H, W) -> (B, c', H, W)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class VAEAttention(nn.Module):
    """Single-head self attention over positions: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = as_tokens(self.q(h))  # (B, 1, HW, c)
        k = as_tokens(self.k(h))
        v = as_tokens(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h[:, 0].transpose(1, 2).reshape(x.shape)  # (B, c, H, W)
        return x + self.proj_out(h)


def as_tokens(x: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, 1, HW, c): the positions as a sequence, for one head."""
    return x.flatten(2).transpose(1, 2)[:, None]


class VAEDownsample(nn.Module):
    """(B, c, H, W) -> (B, c, H/2, W/2). LDM pads on the right and below only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VAEUpsample(nn.Module):
    """(B, c, H, W) -> (B, c, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def make_middle(width: int) -> nn.ModuleDict:
    """The layers at the coarsest level, in the order in which they run."""
    return nn.ModuleDict(
        {
            "block_1": VAEBlock(width, width),
            "attn_1": VAEAttention(width),
            "block_2": VAEBlock(width, width),
        }
    )


def make_blocks(width: int, out: int, blocks: int) -> nn.ModuleList:
    """Residual blocks of a level; the first one changes the width."""
    return nn.ModuleList(VAEBlock(width if i == 0 else out, out) for i in range(blocks))


class VAEEncoder(nn.Module):
    """Image (B, 3, H, W) -> mean and log variance before quant_conv (B, 2C, H/f, W/f)."""

    def __init__(self, widths: list[int], blocks: int, out: int):
        super().__init__()
        width = widths[0]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, level_width in enumerate(widths):
            layers = {"block": make_blocks(width, level_width, blocks)}
            if level < len(widths) - 1:
                layers["downsample"] = VAEDownsample(level_width)
            self.down.append(nn.ModuleDict(layers))
            width = level_width
        self.mid = make_middle(width)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                h = block(h)
            if "downsample" in level:
                h = level["downsample"](h)
        for layer in self.mid.values():
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAEDecoder(nn.Module):
    """Latent behind post_quant_conv (B, C, H/f, W/f) -> image (B, 3, H, W)."""

    def __init__(self, widths: list[int], blocks: int, channels: int):
        super().__init__()
        width = widths[-1]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.mid = make_middle(width)
        levels = []
        for level in reversed(range(len(widths))):
            layers = {"block": make_blocks(width, widths[level], blocks)}
            if level > 0:
                layers["upsample"] = VAEUpsample(widths[level])
            levels.append(nn.ModuleDict(layers))
            width = widths[level]
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the finest level, which runs last
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for layer in self.mid.values():
            h = layer(h)
        for level in reversed(self.up):
            for block in level["block"]:
                h = block(h)
            if "upsample" in level:
                h = level["upsample"](h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's KL-f8 autoencoder under LDM's names.

    encode: image (B, 3, H, W) in [-1, 1] -> the posterior's mean and log variance, each
        (B, C, H/f, W/f) and unscaled.
    decode: unscaled latent -> image.

    The diffusion works on latents times `scale`. `load_autoencoder` opens one, frozen.
    """

    name = "sd"
    scale = 0.18215  # Stable Diffusion 1.x; `pretrained.load_codec` takes a folder's own
    source = None

    def __init__(
        self, ch: int = 128, ch_mult=(1, 2, 4, 4), num_res_blocks: int = 2, z_channels: int = 4
    ):
        super().__init__()
        self.channels = z_channels
        self.factor = 2 ** (len(ch_mult) - 1)
        widths = [ch * mult for mult in ch_mult]
        self.encoder = VAEEncoder(widths, num_res_blocks, 2 * z_channels)
        self.decoder = VAEDecoder(widths, num_res_blocks + 1, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def load_autoencoder(weights: dict[str, Tensor], source="these weights") -> AutoencoderKL:
    """The autoencoder under `first_stage_model.`, frozen, in float32. The shapes tell its size.

    source: what the weights were read from. Raises InputError naming it where there is no such
    autoencoder.
    """
    prefix = PREFIX["vae"]
    given = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
    levels = count(given, r"encoder\.down\.(\d+)")
    blocks = count(given, r"encoder\.down\.0\.block\.(\d+)")
    try:
        ch = len(given["encoder.conv_in.weight"])
        z_channels = len(given["post_quant_conv.weight"])
        ch_mult = []
        for level in range(levels):
            ch_mult.append(len(given[f"encoder.down.{level}.block.0.conv1.weight"]) // ch)
        with torch.device("meta"):  # the weights follow: initialising them would take seconds
            codec = AutoencoderKL(ch, ch_mult, blocks, z_channels)
        state = {name: given[name].float() for name in codec.state_dict()}
        codec.load_state_dict(state, assign=True)
    except (
        Exception
    ) as error:  # a tensor is missing or of another shape; a foreign file may hold anything
        raise InputError(
            f"{source}: no autoencoder of Stable Diffusion 1.x in it ({one_line(error)})"
        ) from None
    return codec.eval().requires_grad_(False)
