"""PyTorch reference networks ("twins") for the parity tests: Omnia-Net, DX-Net and DS-Net of Messaoudi et al. 2023.

Written from a description of the architectures, not from any JAX code. State_dict names are those of the released
code, so a twin's weights have the layout of its files. All shapes are torch order: (N, C, *spatial).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLIERS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
WIDTH_DEPTH = {"toy": (0.25, 0.3)} | {f"b{i}": pair for i, pair in enumerate(MULTIPLIERS)}
# EfficientNet-Lite: no squeeze-excite, ReLU6, fixed stem, and one block in the first and in the last stage
WIDTH_DEPTH |= {"lite_toy": (0.25, 0.3)} | {f"lite{i}": pair for i, pair in enumerate(MULTIPLIERS[:5])}
STAGES = ((1, 16, 3, 1), (2, 24, 3, 2), (2, 40, 5, 2), (3, 80, 3, 2), (3, 112, 5, 1), (4, 192, 5, 2), (1, 320, 3, 1))
USED_STAGES = (1, 2, 4, 6)  # with the activated stem, the five features
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
NORMS = {"batch": (nn.BatchNorm2d, nn.BatchNorm3d), "instance": (nn.InstanceNorm2d, nn.InstanceNorm3d)}


class _Same:
    """TensorFlow's SAME padding in front of a convolution: the extra element goes to the end."""

    def forward(self, x):
        pads = []
        for n, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(n / s) - 1) * s + k - n, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class Conv2dSame(_Same, nn.Conv2d):
    pass


class Conv3dSame(_Same, nn.Conv3d):
    pass


def make_conv(ndim, cin, cout, k, stride=1, *, groups=1, bias=False, padding="symmetric"):
    """Convolution with padding k//2 on both sides, or TensorFlow's SAME."""
    if padding not in ("symmetric", "same"):
        raise ValueError(f"padding: {padding!r}")
    if padding == "same" and k > 1:
        return {2: Conv2dSame, 3: Conv3dSame}[ndim](cin, cout, k, stride, groups=groups, bias=bias)
    return {2: nn.Conv2d, 3: nn.Conv3d}[ndim](cin, cout, k, stride, padding=k // 2, groups=groups, bias=bias)


def make_norm(kind, ndim, channels, eps=1e-5):
    """Norm of kind 'batch', 'instance' (affine) or 'instance_noaffine'."""
    return NORMS[kind.removesuffix("_noaffine")][ndim - 2](channels, eps=eps, affine=not kind.endswith("_noaffine"))


def round_channels(channels, width):
    """Scaled width, to a multiple of 8, at least 8 and not below 90 %."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class DropPath(nn.Module):
    """Stochastic depth per sample, divided by the keep probability; idle in eval mode."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class SqueezeExcite(nn.Module):
    def __init__(self, ndim, channels, reduced):
        super().__init__()
        self.axes = tuple(range(2, 2 + ndim))
        self.conv_reduce = make_conv(ndim, channels, reduced, 1, bias=True)
        self.conv_expand = make_conv(ndim, reduced, channels, 1, bias=True)

    def forward(self, x):
        return x * torch.sigmoid(self.conv_expand(F.silu(self.conv_reduce(x.mean(self.axes, keepdim=True)))))


class Separable(nn.Module):
    def __init__(self, ndim, cin, cout, k, stride, norm, padding, eps, rate, lite):
        super().__init__()
        self.act = nn.ReLU6() if lite else nn.SiLU()
        self.conv_dw = make_conv(ndim, cin, cin, k, stride, groups=cin, padding=padding)
        self.bn1 = make_norm(norm, ndim, cin, eps)
        self.se = nn.Identity() if lite else SqueezeExcite(ndim, cin, round(cin / 4))
        self.conv_pw = make_conv(ndim, cin, cout, 1)
        self.bn2 = make_norm(norm, ndim, cout, eps)
        self.drop_path = DropPath(rate) if stride == 1 and cin == cout else None

    def forward(self, x):
        y = self.bn2(self.conv_pw(self.se(self.act(self.bn1(self.conv_dw(x))))))
        return y if self.drop_path is None else self.drop_path(y) + x


class InvertedResidual(nn.Module):
    def __init__(self, ndim, cin, cout, k, stride, norm, padding, eps, rate, lite):
        super().__init__()
        self.act = nn.ReLU6() if lite else nn.SiLU()
        mid = 6 * cin
        self.conv_pw = make_conv(ndim, cin, mid, 1)
        self.bn1 = make_norm(norm, ndim, mid, eps)
        self.conv_dw = make_conv(ndim, mid, mid, k, stride, groups=mid, padding=padding)
        self.bn2 = make_norm(norm, ndim, mid, eps)
        self.se = nn.Identity() if lite else SqueezeExcite(ndim, mid, round(cin / 4))
        self.conv_pwl = make_conv(ndim, mid, cout, 1)
        self.bn3 = make_norm(norm, ndim, cout, eps)
        self.drop_path = DropPath(rate) if stride == 1 and cin == cout else None

    def forward(self, x):
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.se(self.act(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return y if self.drop_path is None else self.drop_path(y) + x


class Encoder(nn.Module):
    """EfficientNet features at 1/2, 1/4, 1/8, 1/16, 1/32: [x1, x2, x3, x4, x6]; widths in `channels`."""

    def __init__(
        self, name, in_channels, *, ndim=2, norm="batch", padding="symmetric", eps=1e-5, drop_path=0.0, head=True
    ):
        super().__init__()
        width, depth = WIDTH_DEPTH[name]
        lite = name.startswith("lite")
        self.act = nn.ReLU6() if lite else nn.SiLU()
        repeats = [math.ceil(stage[0] * depth) for stage in STAGES]
        if lite:
            repeats[0] = repeats[-1] = 1
        cin = 32 if lite else round_channels(32, width)
        self.conv1 = make_conv(ndim, in_channels, cin, 3, 2, padding=padding)
        self.bnorm1 = make_norm(norm, ndim, cin, eps)
        self.channels = [cin]
        index = 0
        for i, (_, cout, k, stride) in enumerate(STAGES):
            cout = round_channels(cout, width)
            blocks = []
            for j in range(repeats[i]):
                rate = drop_path * index / sum(repeats)
                block = InvertedResidual if i else Separable
                blocks.append(block(ndim, cin, cout, k, 1 if j else stride, norm, padding, eps, rate, lite))
                cin, index = cout, index + 1
            self.add_module(f"enc{i}", nn.Sequential(*blocks))
            if i in USED_STAGES:
                self.channels.append(cout)
        if head:  # in the released state_dict, never called
            head_channels = 1280 if lite else round_channels(1280, width)
            self.conv_head = make_conv(ndim, cin, head_channels, 1)
            self.norm_head = make_norm(norm, ndim, head_channels, eps)

    def forward(self, x):
        x = self.act(self.bnorm1(self.conv1(x)))
        features = [x]
        for i in range(len(STAGES)):
            x = getattr(self, f"enc{i}")(x)
            if i in USED_STAGES:
                features.append(x)
        return features


class ConvBlock(nn.Module):
    """Convolution k3, norm, activation."""

    def __init__(self, ndim, cin, cout, norm, activation):
        super().__init__()
        self.conv = make_conv(ndim, cin, cout, 3)
        self.norm = make_norm(norm, ndim, cout)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Decoder(nn.Module):
    """Upsampling by 2, concatenation [upsampled, skip], two convolution blocks."""

    def __init__(self, ndim, cin, skip, cout, norm, activation, upsampling):
        super().__init__()
        if upsampling not in ("nearest", "transposed"):
            raise ValueError(f"upsampling: {upsampling!r}")
        transposed = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[ndim]
        self.trans = transposed(cin, cin, 2, 2) if upsampling == "transposed" else None
        self.conv1 = ConvBlock(ndim, cin + skip, cout, norm, activation)
        self.conv2 = ConvBlock(ndim, cout, cout, norm, activation)

    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="nearest") if self.trans is None else self.trans(x)
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class Omnia(nn.Module):
    """Omnia-Net; with other operators DX-Net (see `dxnet`) and the 2D part of DS-Net (see `DS`)."""

    def __init__(
        self,
        encoder_name,
        in_channels,
        out_channels,
        *,
        ndim=2,
        filters=(256, 128, 64, 32, 16),
        norm="batch",
        activation="relu",
        upsampling="nearest",
        padding="symmetric",
        eps=1e-5,
        drop_path=0.0,
        full_resolution=True,
        head=True,
        deep_supervision=False,
    ):
        super().__init__()
        first = filters[-1] if full_resolution else 0
        if full_resolution:
            self.conv = make_conv(ndim, in_channels, first, 3)
            self.norm = make_norm(norm, ndim, first)
            self.act = ACTIVATIONS[activation]()
        else:
            self.conv = None
        options = {"ndim": ndim, "norm": norm, "padding": padding, "eps": eps, "drop_path": drop_path, "head": head}
        self.encoder = Encoder(encoder_name, first or in_channels, **options)
        *skips, cin = first, *self.encoder.channels
        for i, (skip, cout) in enumerate(zip(reversed(skips), filters, strict=True), 1):
            self.add_module(f"decoder{i}", Decoder(ndim, cin, skip, cout, norm, activation, upsampling))
            cin = cout
        self.last = make_conv(ndim, cin, out_channels, 3, bias=True)
        self.heads = None
        if deep_supervision:
            self.heads = nn.ModuleList(make_conv(ndim, f, out_channels, 1, bias=True) for f in filters[:-1])

    def forward(self, x):
        full = None
        if self.conv is not None:
            x = full = self.act(self.norm(self.conv(x)))
        *skips, x = full, *self.encoder(x)
        coarse = []
        for i, skip in enumerate(reversed(skips), 1):
            x = getattr(self, f"decoder{i}")(x, skip)
            coarse.append(x)
        logits = self.last(x)
        if self.heads is None:
            return logits
        return [logits, *[head(y) for head, y in zip(self.heads, coarse[:-1], strict=True)][::-1]]


def omnianet(encoder_name="b0", in_channels=1, out_channels=4, **kwargs):
    """Omnia-Net of the released code (stochastic depth off)."""
    return Omnia(encoder_name, in_channels, out_channels, **kwargs)


def dxnet(encoder_name="b0", in_channels=4, out_channels=3, **kwargs):
    """DX-Net of the released code, with free channels (stochastic depth off)."""
    kwargs = {"ndim": 3, "upsampling": "transposed", "activation": "silu"} | kwargs
    return Omnia(encoder_name, in_channels, out_channels, **kwargs)


class PlanesEncoder(nn.Module):
    """Two 3D convolution blocks, the second with a stride along depth."""

    def __init__(self, cin, cout, stride, norm):
        super().__init__()
        self.conv = make_conv(3, cin, cout, 3)
        self.norm = make_norm(norm, 3, cout)
        self.conv2 = make_conv(3, cout, cout, 3, (stride, 1, 1))
        self.norm2 = make_norm(norm, 3, cout)

    def forward(self, x):
        return F.silu(self.norm2(self.conv2(F.silu(self.norm(self.conv(x))))))


class PlanesDecoder(nn.Module):
    """Transposed convolution along depth, evaluated on the skip's planes; concatenation; one convolution block."""

    def __init__(self, cin, skip, cout, norm, kernel, stride, pad):
        super().__init__()
        self.trans = nn.ConvTranspose3d(cin, cin, (kernel, 1, 1), (stride, 1, 1), (pad, 0, 0))
        self.conv1 = ConvBlock(3, cin + skip, cout, norm, "silu")

    def upsample(self, x, planes):
        """out[s i - p + t] += x[i] w[t] for output planes 0..planes-1; the bias alone where no tap reaches."""
        first = self.trans.padding[0]
        x = F.conv_transpose3d(x, self.trans.weight, stride=self.trans.stride)[:, :, first : first + planes]
        x = F.pad(x, (0, 0, 0, 0, 0, planes - x.shape[2]))
        return x + self.trans.bias[:, None, None, None]

    def forward(self, x, skip):
        return self.conv1(torch.cat([self.upsample(x, skip.shape[2]), skip], 1))


class PlanesDecoderNearest(nn.Module):
    """The paper's variant: nearest along depth, cropped to the skip's planes; concatenation; two blocks."""

    def __init__(self, cin, skip, cout, norm, factor):
        super().__init__()
        self.factor = factor
        self.conv1 = ConvBlock(3, cin + skip, cout, norm, "silu")
        self.conv2 = ConvBlock(3, cout, cout, norm, "silu")

    def forward(self, x, skip):
        x = x.repeat_interleave(self.factor, 2)[:, :, : skip.shape[2]]
        return self.conv2(self.conv1(torch.cat([x, skip], 1)))


class DS(nn.Module):
    """DS-Net: planes to `images` three-channel images, a 2D network on each, and back. Depth 97..144, any batch."""

    STRIDES = (3, 2, 2, 4)  # along depth, in the encoder: conv2, enc3, enc4, enc5
    TRANS = ((5, 3, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1))  # kernel, stride, padding along depth of dec1..dec4

    def __init__(
        self,
        encoder_name,
        in_channels,
        out_channels,
        *,
        planes_filters=(16, 32, 48, 96),
        images=4,
        affine=False,
        decoder="transposed",
        inner=None,
    ):
        super().__init__()
        if decoder not in ("nearest", "transposed"):
            raise ValueError(f"decoder: {decoder!r}")
        norm = "instance" if affine else "instance_noaffine"
        f1, f2, f3, f4 = planes_filters
        self.conv1 = make_conv(3, in_channels, f1, 3)
        self.norm1 = make_norm(norm, 3, f1)
        self.conv2 = make_conv(3, f1, f2, 3, (self.STRIDES[0], 1, 1))
        self.norm2 = make_norm(norm, 3, f2)
        self.enc3 = nn.Sequential(PlanesEncoder(f2, f3, self.STRIDES[1], norm))
        self.enc4 = nn.Sequential(PlanesEncoder(f3, f4, self.STRIDES[2], norm))
        self.enc5 = nn.Sequential(PlanesEncoder(f4, images, self.STRIDES[3], norm))
        inner = {"full_resolution": False, "upsampling": "transposed", "activation": "silu"} | (inner or {})
        self.model2D = Omnia(encoder_name, 3, 3, **inner)
        cin = images
        for i, skip in enumerate((f4, f3, f2, f1)):
            if decoder == "transposed":
                block = PlanesDecoder(cin, skip, skip, norm, *self.TRANS[i])
            else:
                block = PlanesDecoderNearest(cin, skip, skip, norm, self.STRIDES[3 - i])
            self.add_module(f"dec{i + 1}", block)
            cin = skip
        self.last = make_conv(3, cin, out_channels, 3, bias=True)

    def forward(self, x):
        y1 = F.silu(self.norm1(self.conv1(x)))
        y2 = F.silu(self.norm2(self.conv2(y1)))
        y3 = self.enc3(y2)
        y4 = self.enc4(y3)
        z = self.enc5(y4)
        if z.shape[2] != 3:
            raise ValueError(f"depth {x.shape[2]} leaves {z.shape[2]} planes instead of 3: use 97..144")
        z = self.model2D(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # the image index runs fastest inside a sample
        return self.last(self.dec4(self.dec3(self.dec2(self.dec1(z, y4), y3), y2), y1))


@torch.no_grad()
def randomise(module, seed):
    """Seeded values for every parameter and buffer, in place (drawn in float64, so equal in every dtype); the module.

    Kernels: std sqrt(2 / fan_in). Fan-in of a transposed convolution: the mean number of products per output.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor, std=None):
        draw = torch.randn if std else torch.rand
        values = draw(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(values * std if std else values + 0.5)

    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            if layer.transposed:
                fan_in = layer.weight[:, 0].numel() / math.prod(layer.stride)
            else:
                fan_in = layer.weight[0].numel()
            fill(layer.weight, math.sqrt(2 / fan_in))
            if layer.bias is not None:
                fill(layer.bias, 0.1)
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            if layer.affine:
                fill(layer.weight)
                fill(layer.bias, 0.1)
            if layer.track_running_stats:
                fill(layer.running_mean, 0.1)
                fill(layer.running_var)
    return module
