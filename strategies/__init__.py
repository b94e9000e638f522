"""The Flower side of the server: the Strategy, the ServerApp, and what carries their messages on one machine."""
