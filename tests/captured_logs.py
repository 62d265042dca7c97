"""What a logger of diffusers says, which does not reach pytest's `caplog`."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said_by(logger: logging.Logger) -> Iterator[io.StringIO]:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
