"""The HTTP client of the radixkv service; imports neither torch nor radixkv.

with Client("http://127.0.0.1:8100") as client:
    for chunk in client.chat([{"role": "user", "content": "Hello"}], max_tokens=64):
        print(chunk.text, end="")
"""

from radixkv_client.client import Client, Message
from radixkv_client.errors import ApiError, BadAnswer, BadUrl, ClientError, ConnectionFailed, StreamBroken
from radixkv_client.metrics import Histogram, Metrics, Sample, parse_metrics
from radixkv_client.retry import NO_RETRY, Retry
from radixkv_client.sse import Event, EventDecoder
from radixkv_client.wire import ChatChunk, Health, Model, Usage

__all__ = [
    "NO_RETRY",
    "ApiError",
    "BadAnswer",
    "BadUrl",
    "ChatChunk",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "Event",
    "EventDecoder",
    "Health",
    "Histogram",
    "Message",
    "Metrics",
    "Model",
    "Retry",
    "Sample",
    "StreamBroken",
    "Usage",
    "__version__",
    "parse_metrics",
]

__version__ = "0.1.0"
