"""onnxruntime: how its sessions are opened, and what they run."""
