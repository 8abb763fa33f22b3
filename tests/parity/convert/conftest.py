"""A small network whose weights the tests of the readers save."""

import pytest
import torch

from tests.support import peers


@pytest.fixture
def net() -> torch.nn.Module:
    """Returns a convolution and a normalisation, the latter with statistics and counter."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    peers.randomize(net, seed=0)
    return net
