"""The machinery of one run: its folder, checkpoints, optimizer, device, measurement and figures."""
