"""The idle watch by itself: what counts as no progress."""

import asyncio
import time

from fsllm.v1.federation_pb2 import Progress
from fsllm_server.engine.idle import IdleWatch
from fsllm_server.engine.state import Kind, Order

ORDER = Order("o1", "a", 1, Kind.TRAIN, None)


async def test_time_in_which_the_server_itself_stood_still_does_not_count() -> None:
    idle: asyncio.Queue[Order] = asyncio.Queue()
    watch = IdleWatch(0.3, idle.put_nowait)
    watch.follow([ORDER])
    time.sleep(1.5)  # noqa: ASYNC251 - the whole process, as under SIGSTOP
    await asyncio.sleep(0)  # the alarm, late, comes before anything that the site has sent
    await asyncio.sleep(0)
    assert idle.empty()
    watch.progress(Progress(order_id="o1", activity="training", done=1))
    # And from then on as ever.
    assert await asyncio.wait_for(idle.get(), 10) is ORDER
    watch.stop()
