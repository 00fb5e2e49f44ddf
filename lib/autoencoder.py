"""Stable Diffusion's autoencoder under LDM's names, and reading it. B batch, C latent channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cli import InputError, one_line
from lib.formats import count


class VAEBlock(nn.Module):
    """Two convolutions beside a skip connection: (B, c, H, W) -> (B, c', H, W)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = (
            nn.GroupNorm(32, width, eps=1e-6),
            nn.Conv2d(width, out, 3, padding=1),
        )
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """Single-head self attention over positions: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )  # (B, 1, HW, c)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, c, HW)
        return x + self.proj_out(h.reshape(x.shape))


class VAEResample(nn.Module):
    """Half or twice the size: (B, c, H, W) -> (B, c, H/2, W/2) or (B, c, 2H, 2W). LDM pads right and below only."""

    def __init__(self, width: int, down: bool):
        super().__init__()
        self.down, self.conv = (
            down,
            nn.Conv2d(width, width, 3, **({"stride": 2} if down else {"padding": 1})),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(
            F.pad(x, (0, 1, 0, 1))
            if self.down
            else F.interpolate(x, scale_factor=2, mode="nearest")
        )


class VAEHalf(nn.Module):
    """The autoencoder's encoder (down) or decoder, which is the encoder in reverse: levels of the given widths."""

    def __init__(
        self, channels: int, width: int, widths: list[int], blocks: int, out: int, down: bool
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        middle, name = widths[-1] if down else width, "down" if down else "up"
        parts = {"block_1": VAEBlock(middle, middle), "attn_1": VAEAttention(middle)}
        self.mid = nn.ModuleDict(parts | {"block_2": VAEBlock(middle, middle)})
        levels, layers = nn.ModuleList(), []
        for i, level_width in enumerate(widths):
            chain = [width] + [level_width] * blocks
            level, width = {"block": nn.ModuleList(map(VAEBlock, chain, chain[1:]))}, level_width
            layers += level["block"]
            if i < len(widths) - 1:
                level[f"{name}sample"] = VAEResample(width, down)
                layers += [level[f"{name}sample"]]
            levels.append(nn.ModuleDict(level))
        setattr(
            self, name, levels if down else levels[::-1]
        )  # up.0 is the finest level, and runs last
        self.order = (*layers, *self.mid.values()) if down else (*self.mid.values(), *layers)
        self.norm_out, self.conv_out = (
            nn.GroupNorm(32, width, eps=1e-6),
            nn.Conv2d(width, out, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for layer in self.order:
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's KL-f8 autoencoder under LDM's names. Where the diffusion runs, latents are times `scale`.

    encode: image (B, 3, H, W) in [-1, 1] -> the posterior's mean and log variance, (B, C, H/f, W/f) each, unscaled.
    decode: unscaled latent -> image. `load_autoencoder` freezes it.
    """

    name, scale, source = "sd", 0.18215, None

    def __init__(
        self, ch: int = 128, ch_mult=(1, 2, 4, 4), num_res_blocks: int = 2, z_channels: int = 4
    ):
        super().__init__()
        self.channels, self.factor = z_channels, 2 ** (len(ch_mult) - 1)
        widths = [ch * mult for mult in ch_mult]
        self.encoder = VAEHalf(3, ch, widths, num_res_blocks, 2 * z_channels, down=True)
        self.decoder = VAEHalf(
            z_channels, widths[-1], widths[::-1], num_res_blocks + 1, 3, down=False
        )
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def load_autoencoder(weights: dict[str, Tensor]) -> AutoencoderKL:
    """The autoencoder under `first_stage_model.`, frozen, in float32; its shape follows from the tensors."""
    given = {
        k.removeprefix("first_stage_model."): v
        for k, v in weights.items()
        if k.startswith("first_stage_model.")
    }
    levels, blocks = (
        count(given, r"encoder\.down\.(\d+)"),
        count(given, r"encoder\.down\.0\.block\.(\d+)"),
    )
    try:
        ch, z_channels = len(given["encoder.conv_in.weight"]), len(given["post_quant_conv.weight"])
        mult = [len(given[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(levels)]
        with torch.device("meta"):
            codec = AutoencoderKL(ch, mult, blocks, z_channels)
        codec.load_state_dict({k: given[k].float() for k in codec.state_dict()}, assign=True)
    except (
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        ZeroDivisionError,
    ) as error:  # missing, or of another shape
        raise InputError(
            f"--vae: no autoencoder of Stable Diffusion 1.x in it ({one_line(error)})"
        ) from None
    return codec.eval().requires_grad_(False)
