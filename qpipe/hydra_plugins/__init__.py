"""What Hydra asks for by name; installs as `hydra_plugins.qpipe`, the only namespace it looks in."""
