"""torchvision's residual blocks with PPCR. Imported only where torchvision is, by ``networks``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from .module import PPCR, end_of_block


class PPCRBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's ``BasicBlock``, ending in ``relu(ppcr(bn2(..)) + identity)``.

    ResNet-18 and ResNet-34 are made of it.

    Args:
        args: those of torchvision's block.
        kwargs: those of torchvision's block.

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

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block.

        Args:
            x: ``[N, C, H, W]``.

        Returns:
            The output of the block, with the shape that torchvision's block gives.

        Raises:
            TypeError: x has a dtype that the layer does not take.
            ValueError: the layer has been replaced by one for another number of channels.

        Example:
            >>> from ppcr_ext.networks import PPCRBasicBlock
            >>> PPCRBasicBlock(8, 8)(torch.randn(1, 8, 6, 6)).shape
            torch.Size([1, 8, 6, 6])
        """
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return end_of_block(self, self.bn2(self.conv2(x)), identity, self.relu)


class PPCRBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's ``Bottleneck``, ending in ``relu(ppcr(bn3(..)) + identity)``.

    ResNet-50 and larger, ResNeXt and Wide ResNet are made of it.

    Args:
        args: those of torchvision's block.
        kwargs: those of torchvision's block.

    Attributes:
        ppcr: the :class:`ppcr_ext.PPCR` layer, or any other in its place; all other parameters keep
            their state-dict keys.
        fuse: whether recalibration, addition and ReLU run in one pass, which is the default.
            Otherwise, and while hooks look at the layer's own output or gradients, they run in
            three steps with the same result.

    Example:
        >>> from ppcr_ext.networks import PPCRBottleneck
        >>> torchvision.models.ResNet(PPCRBottleneck, [1, 1, 1, 1]).layer1[0].ppcr
        PPCR(256, levels=(1, 2, 4), eps=1e-05, bias=True, backend=None)
    """

    fuse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ppcr = PPCR(self.conv3.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block.

        Args:
            x: ``[N, C, H, W]``.

        Returns:
            The output of the block, with the shape that torchvision's block gives.

        Raises:
            TypeError: x has a dtype that the layer does not take.
            ValueError: the layer has been replaced by one for another number of channels.

        Example:
            >>> from ppcr_ext.networks import PPCRBottleneck
            >>> PPCRBottleneck(8, 2)(torch.randn(1, 8, 6, 6)).shape
            torch.Size([1, 8, 6, 6])
        """
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return end_of_block(self, self.bn3(self.conv3(x)), identity, self.relu)
