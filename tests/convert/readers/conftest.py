"""The network whose weights the tests of readers save."""

import pytest
import torch

from tests.support import peers


@pytest.fixture
def net() -> torch.nn.Module:
    """Two layers of the kinds that MobileNetV2 has, statistics and counter included."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    peers.randomize(net, seed=0)
    return net
