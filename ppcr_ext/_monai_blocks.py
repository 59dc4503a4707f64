"""MONAI's residual blocks, of any number of spatial dimensions, with PPCR.

Imported only where MONAI is, by ``networks``.
"""

from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

from .module import ResidualConvolutions


class PPCRResNetBlock(ResidualConvolutions, ResNetBlock):
    """MONAI's ``ResNetBlock``, ending in ``relu(ppcr(bn2(..)) + residual)``. It takes the same
    arguments, and has the attributes of :class:`ppcr_ext.networks.PPCRBasicBlock`.
    """

    _activation = "act"


class PPCRResNetBottleneck(ResidualConvolutions, ResNetBottleneck):
    """MONAI's ``ResNetBottleneck``, ending in ``relu(ppcr(bn3(..)) + residual)``. It takes the same
    arguments, and has the attributes of :class:`ppcr_ext.networks.PPCRBasicBlock`.
    """

    _activation = "act"
