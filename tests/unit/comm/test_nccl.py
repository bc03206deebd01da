"""NCCL with one rank: build, exchange, abort, rebuild. More ranks need as many GPUs."""

import time

import pytest
import torch
from torch.distributed import TCPStore

from revivemoe.comm.fence import DomainLeft, FenceFlag
from revivemoe.comm.gloo import connect
from revivemoe.comm.group import Graveyard, GroupTransport
from revivemoe.comm.wait import Waiter
from revivemoe.ids import Epoch, RankId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a CUDA device"),
]


def test_build_abort_rebuild():
    from revivemoe.comm.nccl import nccl_group

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address, device = f"127.0.0.1:{store.port}", torch.device("cuda", 0)
    graveyard = Graveyard()
    for epoch in (1, 2):
        fence = FenceFlag()
        waiter = Waiter(fence, Epoch(epoch), 30.0)
        group = nccl_group(connect(address, epoch, 30.0), 0, 1, device)
        me = RankId(0)
        transport = GroupTransport(
            group,
            waiter,
            Epoch(epoch),
            (me,),
            me,
            device,
            30.0,
            graveyard,
            pin=False,
            connections=None,
        )
        assert transport.all_gather_ints([1, 2]) == [[1, 2]]
        transport.outbox(16, [3]).fill_(epoch)
        transport.send()
        (rows,) = transport.receive()
        assert rows.is_cuda
        assert torch.equal(rows.cpu(), torch.full((3, 16), epoch, dtype=torch.uint8))
        fence.raise_to(Epoch(epoch + 1))
        with pytest.raises(DomainLeft):
            transport.all_gather_ints([1])
        started = time.monotonic()
        transport.close()
        assert time.monotonic() - started < 0.5
    assert len(graveyard) == 2
