"""fp8_1x128 on a GPU: the numbers of the CPU, and no host synchronisation at one rank."""

from __future__ import annotations

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.formats import Fp8BlockFormat, after_trip
from moe_layer.types import Routing

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [128, 300])
def test_the_numbers_of_the_cpu(D: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(D)
    x_TD = (torch.randn(64, D, generator=g) * torch.exp(2 * torch.randn(64, D, generator=g))).to(dtype)
    x_TD[0], x_TD[1, 3], x_TD[2, 4] = 0, torch.nan, torch.inf
    form = Fp8BlockFormat(D)
    for here, there in zip(form.encode(x_TD), form.encode(x_TD.cuda()), strict=True):
        if here.dtype == torch.float32:
            assert torch.equal(here, there.cpu())
    torch.testing.assert_close(
        after_trip(x_TD.cuda(), form).cpu(), after_trip(x_TD, form), rtol=0, atol=0, equal_nan=True
    )


def test_no_host_synchronisation_at_one_rank() -> None:
    config = DispatchConfig(dispatch_format="fp8_1x128", rows="compact")
    d = make_dispatcher(config, num_experts=4, top_k=2, context=None)
    ids = torch.randint(0, 4, (32, 1), generator=torch.Generator().manual_seed(0))
    routing = Routing.from_ids(torch.cat((ids, (ids + 1) % 4), 1).cuda(), torch.ones(32, 2).cuda(), num_experts=4)
    x = torch.randn(32, 200, device="cuda", requires_grad=True)

    def step() -> None:
        received = d.dispatch(x, routing)
        assert received.index_N is not None
        d.combine(received.rows.index_select(0, received.index_N), received).sum().backward()

    step()  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
