"""Matrix products by oneDNN: torch's, in every layout, and only where they are large."""

import subprocess
import sys

import pytest
import torch

from rlsys.engines.megatron.onednn import FEWEST_PRODUCTS, _product

SIZES = (96, 160, 224)
RUN = """
import torch

from rlsys.engines.megatron.onednn import FEWEST_PRODUCTS, use_onednn

torch.set_num_threads(1)
torch.manual_seed(0)


def products(rows, wide=torch.float32):
    left = torch.randn(rows, 512).to(wide).requires_grad_()
    weight = torch.randn(256, 512).to(wide).requires_grad_()
    product = torch.nn.functional.linear(left, weight)
    product.square().sum().backward()
    return product.detach(), left.grad, weight.grad


def kernels(rows):
    with torch.profiler.profile() as profile:
        products(rows)
    return {event.key for event in profile.key_averages()}


large, small = FEWEST_PRODUCTS // (512 * 256), 16
before = [products(small), kernels(large)]
use_onednn()
use_onednn()
torch.manual_seed(0)
same = all(torch.equal(a, b) for a, b in zip(products(small), before[0]))
print(same, "mkldnn::_linear_pointwise" in before[1], "mkldnn::_linear_pointwise" in kernels(large))
torch.manual_seed(1)
found = products(large)
torch.manual_seed(1)
exact = products(large, torch.float64)
print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact)))
"""


def layouts(rows, columns):
    """Equal numbers, as products of linear layers and their gradients have them in memory."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    wider = torch.zeros(rows, 2 * columns)
    wider[:, :columns] = values
    return {
        "contiguous": values,
        "transposed": values.t().contiguous().t(),
        "columns of a wider one": wider[:, :columns],
        "every other column": wider.view(rows, columns, 2).copy_(values[..., None])[..., 0],
    }


@pytest.mark.parametrize("left_layout", layouts(1, 1))
@pytest.mark.parametrize("right_layout", layouts(1, 1))
def test_a_product_does_not_depend_on_layouts(left_layout, right_layout):
    m, k, n = SIZES
    left, right = layouts(m, k)[left_layout], layouts(k, n)[right_layout]
    expected = left.double() @ right.double()
    found = _product(left, right)
    assert found.shape == (m, n)
    assert found.is_contiguous()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_only_large_products_change_their_kernel_and_none_its_result():
    assert FEWEST_PRODUCTS % (512 * 256) == 0
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kernels, error = done.stdout.strip().splitlines()
    assert kernels == "True False True"
    assert float(error) <= 2e-6
