"""torchvision's residual blocks with PPCR. Imported only where torchvision is, by ``networks``."""

from torchvision.models.resnet import BasicBlock, Bottleneck

from .module import ResidualConvolutions


class PPCRBasicBlock(ResidualConvolutions, BasicBlock):  # type: ignore[misc]
    """torchvision's ``BasicBlock``, ending in ``relu(ppcr(bn2(..)) + identity)``.

    ResNet-18 and ResNet-34 are made of it.

    Args:
        args, kwargs: those of torchvision's block.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters keep
            their state-dict keys.
        fuse: whether recalibration, addition and ReLU run in one pass, which is the default.
            Otherwise, and while hooks look at the layer's own output or gradients, they run in
            three steps with the same result.

    Example:
        >>> from ppcr_ext.networks import PPCRBasicBlock
        >>> torchvision.models.ResNet(PPCRBasicBlock, [1, 1, 1, 1]).layer1[0].ppcr
        PPCR(64, levels=(1, 2, 4), eps=1e-05, bias=True, backend=None)
    """


class PPCRBottleneck(ResidualConvolutions, Bottleneck):  # type: ignore[misc]
    """torchvision's ``Bottleneck``, ending in ``relu(ppcr(bn3(..)) + identity)``.

    ResNet-50 and larger, ResNeXt and Wide ResNet are made of it. Its attributes are those of
    :class:`ppcr_ext.networks.PPCRBasicBlock`.

    Args:
        args, kwargs: those of torchvision's block.

    Example:
        >>> from ppcr_ext.networks import PPCRBottleneck
        >>> torchvision.models.ResNet(PPCRBottleneck, [1, 1, 1, 1]).layer1[0].ppcr
        PPCR(256, levels=(1, 2, 4), eps=1e-05, bias=True, backend=None)
    """
