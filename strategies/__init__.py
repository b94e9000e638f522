"""The Flower side of the server: the Strategy, the ServerApp, and what carries their messages on one machine."""

import os

# Flower and Ray read these when they are imported: no word to outside unless the user says so.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Otherwise Ray hides a GPU from sites that ask for none.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
