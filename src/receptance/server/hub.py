"""What all routes share."""

import logging
from dataclasses import dataclass

from receptance.server.config import ServerConfig
from receptance.server.conversations import Conversations
from receptance.server.metrics import Metrics
from receptance.server.served import Models

log = logging.getLogger("receptance.server")


@dataclass(eq=False)
class Hub:
    config: ServerConfig
    models: Models
    metrics: Metrics
    conversations: Conversations
