"""What the trainer is made of: its settings, a step and how it runs on one device or several, epochs, checkpoints."""
