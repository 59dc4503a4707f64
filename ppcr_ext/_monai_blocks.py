"""MONAI's residual blocks, of any number of spatial dimensions, with PPCR.

Imported only where MONAI is, by ``networks``.
"""

from __future__ import annotations

from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

from .module import ResidualConvolutions


class PPCRResNetBlock(ResidualConvolutions, ResNetBlock):
    """MONAI's ``ResNetBlock``, ending in ``relu(ppcr(bn2(..)) + residual)``. It takes the same
    arguments.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters keep
            their state-dict keys.
        fuse: whether recalibration, addition and ReLU run in one pass, which is the default.
            Otherwise, and while hooks look at the layer's own output or gradients, they run in
            three steps with the same result.
    """

    _activation = "act"


class PPCRResNetBottleneck(ResidualConvolutions, ResNetBottleneck):
    """MONAI's ``ResNetBottleneck``, ending in ``relu(ppcr(bn3(..)) + residual)``. It takes the same
    arguments, and has the attributes of :class:`PPCRResNetBlock`.
    """

    _activation = "act"
