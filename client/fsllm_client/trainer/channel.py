"""The worker's end of the socket: orders in, reports out, and the end of the process when the daemon is gone."""

import logging
import os
import queue
import socket
import threading
from pathlib import Path

from fsllm_client.trainer.orders import Account, Build, Cancel, Evaluate, Message, Prepare, Stop, Train, order_lines

_log = logging.getLogger(__name__)

Work = Prepare | Build | Train | Evaluate | Account


class Channel:
    """Connects to the daemon. A thread reads, so that its death and ``Cancel`` are seen in the midst of an order."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._orders: queue.SimpleQueue[Work | Stop] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def send(self, report: Message) -> None:
        """Send a report."""
        self._socket.sendall(report.model_dump_json().encode() + b"\n")

    def next_order(self) -> Work | Stop:
        """Wait for the next order."""
        order = self._orders.get()
        self._cancelled.clear()  # whatever was cancelled, it came before this order
        return order

    def cancelled(self) -> bool:
        """Tell whether the order in hand is no longer wanted."""
        return self._cancelled.is_set()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    order = order_lines.validate_json(line)
                    if isinstance(order, Cancel):
                        self._cancelled.set()
                    else:
                        self._orders.put(order)
        except OSError as error:
            _log.warning("the socket broke: %s", error)
        # The main thread may be deep in a forward pass or wait for another rank: nothing but this ends both.
        _log.info("the daemon is gone; ending")
        logging.shutdown()
        os._exit(0)
