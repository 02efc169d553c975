"""What every script needs and no experiment changes: entry point, errors, logs, config parsing, sharding helpers."""
