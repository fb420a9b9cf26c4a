"""Fake devices: what torch does on real ones, without any; and what is answered where only numbers could."""

import pytest
import torch

from ktransformers.simulator.fake import fake_devices

INDICES = {
    "number": 1, "last": -1, "slice": slice(1, None), "step": slice(None, None, 2), "none": None, "rest": ...,
    "column": (..., 0), "new": (slice(None), None, 1), "tensor": torch.tensor([0, 2]), "both": (..., torch.tensor([0, 2])),
    "pair": (torch.tensor([0, 1]), torch.tensor([1, 1])), "after": (slice(1), 0, torch.tensor([0, 3, 1])), "list": [0, 1],
}  # fmt: skip


@pytest.mark.parametrize("how", INDICES)
def test_indexing_a_fake_tensor_has_the_shape_that_indexing_has(how):
    index = INDICES[how]
    parts = index if isinstance(index, tuple) else (index,)
    expected = torch.empty(3, 4, 5)[index].shape
    with fake_devices():
        there = [torch.empty(p.shape, dtype=p.dtype, device="cuda:3") if isinstance(p, torch.Tensor) else p for p in parts]
        index = tuple(there) if isinstance(index, tuple) else there[0]
        x = torch.empty(3, 4, 5, device="cuda:3")
        if how != "list":
            assert x[index].shape == expected and x[index].device == torch.device("cuda:3")
            x[index] = 1.0
            x[index] = torch.zeros(expected, device="cuda:3")


def test_a_mask_picks_everything_and_a_number_is_nothing():
    with fake_devices():
        x = torch.empty(3, 4, device="cuda")
        assert x.device == x.cuda().device == torch.device("cuda:0")
        assert x[x > 0].shape == (12,) and (x > 0).nonzero().shape == (12, 2)
        assert not x.any() and x.sum().item() == 0.0 and int(x.argmax()) == 0
        with pytest.raises(Exception, match="device"):
            x + torch.empty(3, 4, device="cuda:1")


@pytest.mark.parametrize("device", ["cpu", "cuda:2"])
def test_a_convolution_has_its_shape_and_refuses_another_device(device):
    with fake_devices():
        x, weight = torch.empty(2, 6, 9, device=device), torch.empty(6, 1, 4, device=device)
        found = torch.nn.functional.conv1d(x, weight, padding=3, groups=6)
        assert found.shape == (2, 6, 12) and found.device == torch.device(device)
        with pytest.raises(RuntimeError, match="device"):
            torch.nn.functional.conv1d(x, weight.to("cuda:5"), padding=3, groups=6)


@pytest.mark.parametrize(("device", "width"), [("cuda:2", 8), ("cuda:2", 6), ("cpu", 8), ("cpu", 6)])
def test_fused_attention_gives_values_and_refuses_another_device(device, width):
    with fake_devices():
        q, k = torch.empty(1, 2, 5, 8, device=device), torch.empty(1, 2, 7, 8, device=device)
        v = torch.empty(1, 2, 7, width, device=device)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert out.shape == (1, 2, 5, width) and out.device == torch.device(device)
        with pytest.raises(Exception, match="size|shape"):
            torch.nn.functional.scaled_dot_product_attention(q, k, v[:, :, 1:])
        with pytest.raises(Exception, match="device"):
            torch.nn.functional.scaled_dot_product_attention(q, k.to("cuda:5"), v)
