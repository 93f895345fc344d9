"""Costs against closed forms."""

import pytest
import torch
from torch import Tensor, nn

from stvit_video.models import create_model
from stvit_video.models.cost import count_training_memory


class Net(nn.Module):
    """A clip's mean over space, a linear layer and a GELU: what autograd must keep can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.layer(x.mean(dim=(3, 4)).transpose(1, 2)))


def test_training_memory_of_a_small_network() -> None:
    frames = 64
    kept = frames * 3 + frames * 1000  # the input of the layer, and that of the GELU
    assert count_training_memory(Net(), (frames, 8, 8)) == pytest.approx(4 * kept / 1e9)
    assert count_training_memory(Net(), (frames, 8, 8), "bf16") < 0.6 * 4 * kept / 1e9


@pytest.mark.parametrize("name", ["stvit_vit_tiny_patch16", "stvit_r_swin_small"])
def test_training_memory_does_not_change_the_model_and_recomputation_saves(name: str) -> None:
    model = create_model(name, num_frames=4, image_size=64, num_classes=5).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = count_training_memory(model, (4, 64, 64))
    model.set_grad_checkpointing()
    assert count_training_memory(model, (4, 64, 64)) < 0.7 * plain
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
