"""Which modules compute with our kernels, and what they do with inputs that do not fit."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from revivemoe.kernels.native import Native
from revivemoe.model.native_modules import rows_ours, use_native


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, 96), Qwen3MoeRMSNorm(64)
        self.other, self.layer_norm = Gemma3RMSNorm(64), nn.LayerNorm(64)
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.other.weight.data.uniform_(-0.5, 0.5)


def ours(module: nn.Module) -> bool:
    return "forward" in vars(module)


@torch.no_grad()
def test_what_is_the_same_is_ours_and_the_rest_stays(native: Native) -> None:
    model, rows = Model(), torch.randn(3, 5, 64)
    before = [module(rows) for module in model.children()]
    use_native(model, native, always=True)
    assert [ours(module) for module in model.children()] == [True, True, False, False]
    for module, expected in zip(model.children(), before, strict=True):
        torch.testing.assert_close(module(rows), expected)


@torch.no_grad()
def test_other_dtypes_and_widths_go_the_old_way(native: Native) -> None:
    """They must not be read as what they are not."""
    model = Model().bfloat16()
    use_native(model, native, always=True)
    wide = torch.randn(4, 64)
    assert model.norm(wide).dtype == torch.float32
    torch.testing.assert_close(model.norm(wide), Qwen3MoeRMSNorm.forward(model.norm, wide))
    with pytest.raises(RuntimeError):
        model.up(wide)
    with pytest.raises(RuntimeError):
        model.up(torch.randn(4, 32).bfloat16())
    with pytest.raises(RuntimeError):
        model.norm(torch.randn(4, 32).bfloat16())


@torch.no_grad()
def test_weights_may_be_exchanged(native: Native) -> None:
    model, rows = Model(), torch.randn(2, 64)
    use_native(model, native, always=True)
    model.up.weight = nn.Parameter(torch.zeros(96, 64))
    assert torch.equal(model.up(rows), model.up.bias.expand(2, -1))


def test_the_faster_one_is_taken(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: ours up to as many rows as it is faster; never, if it never is."""
    taken = {"ours": 1.0, "torch": 2.0}

    def seconds(act) -> float:
        return taken["ours" if act.func == native.linear else "torch"]

    monkeypatch.setattr("revivemoe.model.native_modules._seconds", seconds)
    assert rows_ours(torch.randn(8, 64), native) > 1 << 30
    taken["ours"] = 1.9
    assert rows_ours(torch.randn(8, 64), native) == 0
