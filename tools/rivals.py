"""What tools.bench holds our training step against, and variants of our own code.

The rivals: diffusers' UNet inside our training step, and Zero-1-to-3's own step. The variants:
speed tricks without a number measured on a GPU. Each patches one model or one setting, for one
measured row. A trick that gains 3% or more goes into the plain code, with its number beside it; one
that does not is deleted here.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from lib.autoencoder import AutoencoderKL
from lib.distributed import compile_in_place, flops_per_sample
from model import (
    GroupNorm,
    NovelViewModel,
    ResBlock,
    condition_dropout,
    sample_timesteps,
    training_losses,
)
from pretrained import CLIP, DINOV2, ImageEncoder


@dataclass(frozen=True)
class Size:
    """Shapes of everything that a benchmark runs."""

    width: int  # the UNet's channels at full resolution
    mult: tuple[int, ...]  # channels of each stage, in multiples of the width
    blocks: int  # residual blocks a stage
    heads: int
    context: int  # width of the context token
    image: int  # pixels
    vae_width: int
    vae_blocks: int
    vit: str  # timm's name of the image encoder
    vit_size: int  # pixels
    layers: tuple[int, ...]  # whose patch features are kept
    cls: int  # width of the [CLS] token, and of each layer
    tokens: int  # patches
    pca: int  # channels of the features after a PCA
    clip: str | None = None  # Zero-1-to-3's image encoder, where it is another one


SIZES = {
    # the paper's shapes
    "full": Size(
        width=320,
        mult=(1, 2, 4, 4),
        blocks=2,
        heads=8,
        context=768,
        image=256,
        vae_width=128,
        vae_blocks=2,
        vit=DINOV2,
        vit_size=224,
        layers=(5, 11, 17, 23),
        cls=1024,
        tokens=256,
        pca=1024,
        clip=CLIP,
    ),
    # about the same ratios of UNet, VAE and ViT, for one CPU core
    "small": Size(
        width=64,
        mult=(1, 2, 4, 4),
        blocks=2,
        heads=4,
        context=192,
        image=128,
        vae_width=32,
        vae_blocks=1,
        vit="vit_small_patch16_224",
        vit_size=96,
        layers=(2, 5, 8, 11),
        cls=384,
        tokens=36,
        pca=384,
    ),
    # for tests
    "tiny": Size(
        width=32,
        mult=(1, 2),
        blocks=1,
        heads=4,
        context=32,
        image=32,
        vae_width=32,
        vae_blocks=1,
        vit="vit_tiny_patch16_224",
        vit_size=32,
        layers=(3, 7),
        cls=192,
        tokens=4,
        pca=64,
    ),
}


def random_frozen(size: Size, device: torch.device) -> tuple[ImageEncoder, AutoencoderKL]:
    """The frozen networks with random weights, otherwise as pretrained.open_frozen gives them."""
    encoder = ImageEncoder(size.vit, "random", size.layers, size.vit_size)
    codec = random_codec(size, device).to(memory_format=torch.channels_last)
    return encoder.to(device), codec


def random_codec(size: Size, device: torch.device) -> AutoencoderKL:
    with device:
        codec = AutoencoderKL(size.vae_width, num_res_blocks=size.vae_blocks)
    return codec.eval().requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Random numbers in place of weights that are all zero: zeros draw less power."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


# --------------------------------------------------------------------------------------- diffusers


class DiffusersUNet(nn.Module):
    """diffusers' UNet of the same shape, called as ours is.

    It has no patch features and computes all of the cross attention. plain: as in Zero-1-to-3's
    code, with checkpointing and an attention in several kernels.
    """

    feature_dim = 0

    def __init__(self, size: Size, plain: bool = False):
        super().__init__()
        from diffusers import UNet2DConditionModel  # an optional package
        from diffusers.models.attention_processor import AttnProcessor

        kinds = ["CrossAttn" if stage < 3 else "" for stage in range(len(size.mult))]
        self.unet = UNet2DConditionModel(
            in_channels=8,
            out_channels=4,
            block_out_channels=[size.width * mult for mult in size.mult],
            layers_per_block=size.blocks,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            cross_attention_dim=size.context,
            attention_head_dim=size.heads,  # diffusers means the number of heads
        )
        if plain:
            self.unet.enable_gradient_checkpointing()
            self.unet.set_attn_processor(AttnProcessor())

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, features=None, pose_emb=None
    ) -> Tensor:
        return self.unet(x, t, context, return_dict=False)[0]


# ------------------------------------------------------------------------------------- Zero-1-to-3


class Zero123Step:
    """An optimiser step as Zero-1-to-3's training code takes it, on the same random images.

    float32, eager, checkpointed; two VAE encodes and CLIP inside the step; AdamW without `fused`;
    an EMA updated tensor by tensor after every micro-batch.
    """

    def __init__(self, size: Size, micro: int, accumulate: int, device: torch.device):
        self.size = size
        self.micro = micro
        self.accumulate = accumulate
        self.device = device
        self.number = 0
        self.encoder = ImageEncoder(size.clip or size.vit, "random", (), size.vit_size).to(device)
        self.codec = random_codec(size, device)
        with device:
            self.model = NovelViewModel(
                cls_dim=self.encoder.cls_dim,
                context_dim=size.context,
                model_channels=32,
                channel_mult=(1,),
                latent_size=size.image // 8,
            )
            self.model.unet = DiffusersUNet(size, plain=True)
        fill_zeros(self.model)
        self.model.train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.averaged = train.averages_of_trained(self.ema, self.model)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01)
        self.target, self.cond = torch.rand(2, micro, 3, size.image, size.image) * 2 - 1
        self.pose = torch.randn(micro, 4)

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What an archive spares us: (target mean, target log variance, condition)."""
        target = self.target.to(self.device)
        cond = self.cond.to(self.device)
        mean, logvar = self.codec.encode(target)
        condition = {
            "latent": self.codec.encode(cond)[0],
            "cls": self.encoder(cond)[0],
            "pose": self.pose.to(self.device),
        }
        return mean, logvar, condition

    def flops_per_sample(self) -> int:
        with FlopCounterMode(display=False) as counter:
            _, _, condition = self.encode()
        return counter.get_total_flops() // self.micro + flops_per_sample(self.model, condition)

    def __call__(self) -> None:
        decay = train.ema_decay(self.number, 0.9999)
        shape = (4, self.size.image // 8, self.size.image // 8)
        samples = self.micro * self.accumulate
        draws = train.step_draws(0, self.number, samples, shape, self.device)
        for first in range(0, samples, self.micro):
            u_t, u_drop, noise, posterior = (d[first : first + self.micro] for d in draws)
            mean, logvar, condition = self.encode()
            x0 = self.codec.scale * (mean + (0.5 * logvar).exp() * posterior)
            t = sample_timesteps(u_t, "uniform")
            keep = condition_dropout(u_drop)
            losses = training_losses(self.model, x0, t, noise, condition, *keep)
            (losses.mean() / self.accumulate).backward()
            for average, parameter in zip(self.averaged, self.trained, strict=True):
                average.sub_((1 - decay) * (average - parameter.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1


# ----------------------------------------------------------------------- variants of our own code
# Each is a context in which a row is measured; it is given the row's model.


@contextmanager
def plain(model: nn.Module):
    """Nothing changed."""
    yield


@contextmanager
def bias_with_embedding(model: nn.Module):
    """A residual block adds its first convolution's bias together with the timestep embedding.

    By itself the bias, and its gradient, take a pass over the whole feature map.
    """

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        shift = self.emb_layers(emb)
        shift = shift + conv.bias.to(shift.dtype)
        h = F.conv2d(silu(norm(x)), conv.weight, padding=1) + shift[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)

    replace_forward(model, ResBlock, forward)
    yield


@contextmanager
def expanded_upsampling(model: nn.Module):
    """Nearest-neighbour upsampling by an expanded view.

    Its backward is a sum; the compiler makes atomic additions of nn.Upsample's.
    """

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
        return x.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)

    replace_forward(model, nn.Upsample, forward)
    yield


@contextmanager
def nchw_group_norm(model: nn.Module):
    """PyTorch's own GroupNorm, whose CUDA kernel returns NCHW memory."""
    replace_forward(model, GroupNorm, nn.GroupNorm.forward)
    yield


@contextmanager
def group_norm_by_channel(model: nn.Module):
    """GroupNorm whose moments are taken of each channel first, and then put together.

    Sums run along contiguous memory; backward needs one pass of them for weight, bias and input.
    """

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        grouped = (self.num_groups, C // self.num_groups)
        y = x.permute(0, 2, 3, 1).reshape(B, H * W, C).float()
        var, mean = torch.var_mean(y, dim=1, correction=0)  # (B, C)
        var = var.unflatten(1, grouped).mean(dim=2, keepdim=True)
        between, mean = torch.var_mean(
            mean.unflatten(1, grouped), dim=2, keepdim=True, correction=0
        )  # (B, groups, 1)
        scale = torch.rsqrt(var + between + self.eps) * self.weight.reshape(grouped)
        shift = self.bias.reshape(grouped) - mean * scale
        y = y * scale.reshape(B, 1, C) + shift.reshape(B, 1, C)
        return y.to(x.dtype).reshape(B, H, W, C).permute(0, 3, 1, 2)

    replace_forward(model, GroupNorm, forward)
    yield


@contextmanager
def triton_group_norm(model: nn.Module):
    """GroupNorm with its SiLU, reductions by Triton kernels. Raises ImportError without a GPU."""
    from tools.triton_norm import group_norm  # here: few machines without a GPU have triton

    def block_forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(group_norm(norm, x, silu=True)) + self.emb_layers(emb)[:, :, None, None]
        norm, _, _, conv = self.out_layers
        return self.skip_connection(x) + conv(group_norm(norm, h, silu=True))

    replace_forward(model, GroupNorm, group_norm)
    replace_forward(model, ResBlock, block_forward)
    yield


@contextmanager
def cudnn_benchmark(model: nn.Module):
    """cuDNN times its algorithms for each shape and takes the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def compiler_thresholds(model: nn.Module):
    """The compiler recomputes more cheap operations in backward instead of storing their results.

    The numbers are inductor's thresholds for storing; its defaults were 4, 8 and 30.
    """
    import torch._inductor.config as config  # this import takes seconds

    with config.patch(
        realize_reads_threshold=8,
        realize_acc_reads_threshold=16,
        realize_opcount_threshold=60,
    ):
        yield


def replace_forward(model: nn.Module, kind: type, forward: Callable) -> None:
    """Gives all modules of this kind in the model another forward."""
    for module in model.modules():
        if isinstance(module, kind):
            module.forward = MethodType(forward, module)


VARIANTS = {
    "plain": plain,
    "bias with embedding": bias_with_embedding,
    "expanded upsampling": expanded_upsampling,
    "NCHW GroupNorm": nchw_group_norm,
    "GroupNorm by channel": group_norm_by_channel,
    "Triton GroupNorm": triton_group_norm,
    "cudnn.benchmark": cudnn_benchmark,
    "compiler thresholds": compiler_thresholds,
}


def compile_in_mode(mode: str) -> Callable:
    def compile_module(module: nn.Module) -> None:
        module.compile(mode=mode)

    return compile_module


COMPILERS = {
    "default": compile_in_place,  # train.py's
    "reduce-overhead": compile_in_mode("reduce-overhead"),  # CUDA graphs
    "max-autotune": compile_in_mode("max-autotune"),
    "max-autotune-no-cudagraphs": compile_in_mode("max-autotune-no-cudagraphs"),
}
