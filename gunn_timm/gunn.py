"""GUNN: Gradually Updated Neural Networks

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
(Siyuan Qiao, Zhishuai Zhang, Wei Shen, Bo Wang, Alan Yuille, ICML 2018)

Written from the paper. What it leaves open (the projection in the CIFAR units, the stems and transitions, the init)
follows the authors' Torch7 code, https://github.com/joe-siyuan-qiao/GUNN (BSD); no code was taken from there.

The number in a name is the paper's, which counts a layer as one block of four convolutions (CIFAR) or three (ImageNet).
"""
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import AvgPool2dSame, LayerType, calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models import FeatureListNet, build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import nn

from ._timm import feature_take_indices, register_model
from .layers import GunnConv, GunnLayer
from .zoo.files import fetch_verified
from .zoo.records import available_weights, pretrained_source

__all__ = ['Gunn']


class GunnStage(nn.Module):
    """A transition (1x1 convolution and 2x2 average pooling), except in the first stage, and a gradually updated layer.

    Args:
        in_chs: Input channels.
        out_chs: Channels of the layer.
        num_segments: Segments of the layer.
        downsample: Whether there is a transition.
        stride: 2 for a transition that halves the size, 1 for one that keeps it.
        pool_first: Pool before the convolution (ImageNet networks) or after (CIFAR networks).
        layer_kwargs: Further arguments of `GunnLayer`.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            num_segments: int,
            downsample: bool = True,
            stride: int = 2,
            pool_first: bool = True,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **layer_kwargs: Any,
    ):
        super().__init__()
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        if downsample:
            pool = nn.AvgPool2d(2) if stride == 2 else AvgPool2dSame(2, stride=1)
            conv = GunnConv(in_chs, out_chs, 1, **kwargs)
            # The pool's name tells the order because TorchScript compiles Sequentials of the same names and types once,
            # whatever their order.
            self.downsample = nn.Sequential(OrderedDict(
                [('pre_pool', pool), ('conv', conv)] if pool_first else [('conv', conv), ('post_pool', pool)]))
        else:
            self.downsample = nn.Identity()
        self.layer = GunnLayer(out_chs, num_segments, **layer_kwargs, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""
        return self.layer(self.downsample(x))


class Gunn(nn.Module):
    """Gradually Updated Neural Network.

    Args:
        layout: 'imagenet' (7x7/2 stem and max pool, pool before each transition's convolution, no projection in the
            units; paper Table 2) or 'cifar' (3x3 stem at full size, pool after, projections, a last 1x1 convolution).
        channels: Channels of each gradually updated layer, N of the paper.
        segments: Segments of each layer, P of the paper.
        expansion: K of the paper.
        num_blocks: M of the paper.
        ordered: With False the unordered baseline, SUNN, of the paper.
        residual: With False the updates replace the old values (paper Table 5).
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the input image.
        global_pool: Global pooling: 'avg', 'max', 'avgmax', 'catavgmax', a 'fast' variant, or '' for none.
        output_stride: Largest stride; later transitions keep the size and the units are dilated instead. None for the
            layout's own, 32 ('imagenet') or 4 ('cifar').
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly over the units; none without `residual`.
        act_layer: Activation.
        norm_layer: Normalisation.

    Raises:
        ValueError: An argument is out of range; the message names it and what is accepted.
    """

    def __init__(
            self,
            layout: str = 'imagenet',
            channels: Tuple[int, ...] = (400, 800, 1600, 2000),
            segments: Tuple[int, ...] = (10, 20, 40, 50),
            expansion: int = 2,
            num_blocks: int = 1,
            ordered: bool = True,
            residual: bool = True,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: Optional[int] = None,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if layout not in ('imagenet', 'cifar'):
            raise ValueError(f"layout must be 'imagenet' or 'cifar'; got '{layout}'.")
        if len(channels) != len(segments) or not channels:
            raise ValueError(f'channels and segments must be of one length, at least 1; got {channels} and {segments}.')
        if num_classes < 0:
            raise ValueError(f'num_classes must be 0 (no classifier) or more; got {num_classes}.')
        is_cifar = layout == 'cifar'
        strides = [(1 if is_cifar else 4) * 2 ** i for i in range(len(channels))]
        output_stride = strides[-1] if output_stride is None else output_stride
        if output_stride not in strides:
            raise ValueError(f'output_stride must be one of {strides}; got {output_stride}.')
        dd = {'device': device, 'dtype': dtype}
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.num_classes = num_classes
        self.in_chans = in_chans

        self.feature_info: List[Dict[str, Any]] = []
        if is_cifar:
            stem = [('conv1', GunnConv(in_chans, 64, 3, **kwargs))]
        else:
            stem = [
                ('conv1', GunnConv(in_chans, 64, 7, stride=2, **kwargs)),
                ('pool', nn.MaxPool2d(3, stride=2, padding=1)),
            ]
            self.feature_info.append(dict(num_chs=64, reduction=2, module='stem.conv1'))
        self.stem = nn.Sequential(OrderedDict([*stem, ('conv2', GunnConv(64, channels[0], 1, **kwargs))]))

        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(segments), stagewise=True)
        stages = []
        for i, (chs, stride) in enumerate(zip(channels, strides)):
            stages.append(GunnStage(
                channels[max(i - 1, 0)], chs, segments[i],
                downsample=i > 0, stride=2 if stride <= output_stride else 1, pool_first=not is_cifar,
                dilation=max(1, stride // output_stride), expansion=expansion, num_blocks=num_blocks,
                shortcut=is_cifar, residual=residual, ordered=ordered, drop_path=drop_path_rates[i], **kwargs))
            self.feature_info.append(dict(num_chs=chs, reduction=min(stride, output_stride), module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)

        self.num_features = channels[-1]
        self.final_conv = GunnConv(self.num_features, self.num_features, 1, **kwargs) if is_cifar else nn.Identity()
        self.global_pool, self.head_drop, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise in place as the authors' code does: convolutions N(0, 2 / (k * k * out_channels)), fc bias 0.

        It works on parameters without values, as `to_empty` leaves them.
        """
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that group parameters by depth: a group a stage (coarse), or for its transition and its layer."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.layer', (1,)),
                (r'^final_conv', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each update unit, but for its first convolutions, in backward (activation checkpointing).

        BatchNorm statistics are updated once a step. A layer that runs by concatenation keeps its activations, unless
        it is compiled.
        """
        for module in self.modules():
            if isinstance(module, GunnLayer):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, a Linear or (num_classes 0) an Identity."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier (0 classes: none) and, unless it is None, the global pooling.

        Raises:
            ValueError: `num_classes` is negative.
        """
        if num_classes < 0:
            raise ValueError(f'num_classes must be 0 (no classifier) or more; got {num_classes}.')
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Compute the features and, on the way, the feature maps of `feature_info`.

        Args:
            x: Images, shape (N, in_chans, H, W).
            indices: Maps to return: all if None, the last n if an int, else those of these indices.
            norm: Unused, no norm follows the stages.
            stop_early: Stop after the last map asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps only.

        Returns:
            The features and the maps, or the maps; map i has shape (N, num_chs, H / reduction, W / reduction).

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW'; got '{output_fmt}'.")
        intermediates = []
        # The layout with a strided stem has one map more than stages: the stem's first convolution.
        num_stem_maps = len(self.feature_info) - len(self.stages)
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)

        for i, module in enumerate(self.stem):
            x = module(x)
            if i == 0 and num_stem_maps and 0 in take_indices:
                intermediates.append(x)
            if stop_early and num_stem_maps and max_index == 0:
                break
        for i, stage in enumerate(self.stages[:max_index + 1 - num_stem_maps] if stop_early else self.stages):
            x = stage(x)
            if i + num_stem_maps in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == len(self.feature_info) - 1:
            x = self.final_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove in place what the asked feature maps do not need, and return the indices of those that are kept.

        Args:
            indices: Maps to keep: the last n if an int, else those of these indices.
            prune_norm: Remove the last 1x1 convolution of the CIFAR layout too.
            prune_head: Remove the classifier.
        """
        num_maps = len(self.feature_info)
        num_stem_maps = num_maps - len(self.stages)
        take_indices, max_index = feature_take_indices(num_maps, indices)
        prune_end = max_index < num_maps - 1
        self.stages = self.stages[:max_index + 1 - num_stem_maps]
        if num_stem_maps and max_index == 0:
            self.stem = self.stem[:1]
        self.feature_info = self.feature_info[:max_index + 1]
        if prune_norm or prune_end:
            self.final_conv = nn.Identity()
        if prune_end:
            # The features now end at the last kept map, and the head is of the width of the last stage.
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_chans, H, W) to features (N, num_features, H / output_stride, W / output_stride)."""
        return self.final_conv(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map features to logits (N, num_classes), or to the pooled features (N, head_hidden_size) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class GunnFeatures(FeatureListNet):
    """timm's feature extractor, which checkpoints activations as the model does: BatchNorm counts a batch once."""
    set_grad_checkpointing = Gunn.set_grad_checkpointing


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    elif isinstance(module, nn.Linear):
        module.reset_parameters()
        nn.init.zeros_(module.bias)
    elif hasattr(module, 'reset_parameters'):
        module.reset_parameters()
    elif isinstance(module, GunnConv) and getattr(module.bn, 'running_var', None) is not None:
        # What this init makes of an input of variance 1. Starting from 1 instead, the untrained network overflows in
        # eval mode: a unit reads P times as many channels as it writes, and so amplifies, P units in a row.
        module.bn.running_var.fill_(2 * module.conv.in_channels / module.conv.out_channels)


_CIFAR10_MEAN, _CIFAR10_STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
_CIFAR100_MEAN, _CIFAR100_STD = (129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'fc',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/joe-siyuan-qiao/GUNN',
        'paper_name': 'Gradually Updated Neural Networks for Large-Scale Image Recognition',
        'paper_ids': 'arXiv:1711.09280',
        **kwargs,
    }


def _cifar10_cfg(**kwargs: Any) -> Dict[str, Any]:
    return _cfg(**{
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bilinear', 'mean': _CIFAR10_MEAN, 'std': _CIFAR10_STD, **kwargs,
    })


def _cifar100_cfg(**kwargs: Any) -> Dict[str, Any]:
    return _cifar10_cfg(**{'num_classes': 100, 'mean': _CIFAR100_MEAN, 'std': _CIFAR100_STD, **kwargs})


default_cfgs = generate_default_cfgs({
    name: {**cfg, **pretrained_source(name)} for name, cfg in {
        'gunn15.cifar10': _cifar10_cfg(),
        'gunn15.cifar100': _cifar100_cfg(),
        'gunn24.cifar10': _cifar10_cfg(),
        'gunn24.cifar100': _cifar100_cfg(),
        'gunn18.in1k': _cfg(),
        'gunn18.mini_in100': _cfg(
            num_classes=100, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, interpolation='bilinear'),
        'wide_gunn18.in1k': _cfg(),
        'sunn15.cifar10': _cifar10_cfg(),
        'sunn15.cifar100': _cifar100_cfg(),
        'sunn24.cifar10': _cifar10_cfg(),
        'sunn24.cifar100': _cifar100_cfg(),
        'sunn18.in1k': _cfg(),
        'gunn15_nores.cifar10': _cifar10_cfg(),
        'gunn15_nores.cifar100': _cifar100_cfg(),
    }.items()
})

_GUNN15 = dict(layout='cifar', channels=(240, 300, 360), segments=(20, 25, 30))
_GUNN24 = dict(layout='cifar', channels=(720, 900, 1080), segments=(20, 25, 30), expansion=3, num_blocks=2)
_GUNN18 = dict(layout='imagenet', channels=(400, 800, 1600, 2000), segments=(10, 20, 40, 50))
_WIDE_GUNN18 = dict(layout='imagenet', channels=(1200, 1600, 2000, 2000), segments=(30, 40, 50, 50))


def _create_gunn(variant: str, pretrained: bool = False, **kwargs: Any) -> Gunn:
    if pretrained:
        overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
        if overlay.get('hf_hub_id') or overlay.get('url'):
            overlay = {'file': None, **overlay}  # timm takes a file before them, and the default cfg may have one
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        if not cfg.has_weights and not cfg.state_dict:
            raise RuntimeError(
                f"No pretrained weights exist for {'.'.join(filter(None, (variant, cfg.tag)))}. Weights exist for: "
                f'{available_weights()}. Use `pretrained=False` for random init.')
        kwargs['pretrained_cfg'] = fetch_verified(cfg, kwargs.get('cache_dir')).to_dict(remove_null=False)
    num_maps = len(kwargs['channels']) + (kwargs['layout'] == 'imagenet')
    feature_cfg = dict(out_indices=tuple(range(num_maps)), flatten_sequential=True, feature_cls=GunnFeatures)
    return build_model_with_cfg(Gunn, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def gunn15(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """GUNN-15 for 32x32 images: 1.6 M parameters (paper section 5)."""
    return _create_gunn('gunn15', pretrained, **{**_GUNN15, **kwargs})


@register_model
def gunn24(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """GUNN-24 for 32x32 images: 29.5 M parameters, two blocks a unit (paper section 5)."""
    return _create_gunn('gunn24', pretrained, **{**_GUNN24, **kwargs})


@register_model
def gunn18(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """GUNN-18 for 224x224 images: 28.9 M parameters with 1000 classes (paper section 5, Table 2)."""
    return _create_gunn('gunn18', pretrained, **{**_GUNN18, **kwargs})


@register_model
def wide_gunn18(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """Wide GUNN-18 for 224x224 images: 45.6 M parameters (paper section 5, Table 2)."""
    return _create_gunn('wide_gunn18', pretrained, **{**_WIDE_GUNN18, **kwargs})


@register_model
def sunn15(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """SUNN-15, the paper's baseline: GUNN-15 with all segments updated at once (paper section 6)."""
    return _create_gunn('sunn15', pretrained, **{**_GUNN15, 'ordered': False, **kwargs})


@register_model
def sunn24(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """SUNN-24, the paper's baseline: GUNN-24 with all segments updated at once (paper section 6)."""
    return _create_gunn('sunn24', pretrained, **{**_GUNN24, 'ordered': False, **kwargs})


@register_model
def sunn18(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """SUNN-18, the paper's baseline: GUNN-18 with all segments updated at once (paper section 6)."""
    return _create_gunn('sunn18', pretrained, **{**_GUNN18, 'ordered': False, **kwargs})


@register_model
def gunn15_nores(pretrained: bool = False, **kwargs: Any) -> Gunn:
    """GUNN-15 without residual learning: a unit's output replaces its segment (paper section 6, Table 5)."""
    return _create_gunn('gunn15_nores', pretrained, **{**_GUNN15, 'residual': False, **kwargs})
