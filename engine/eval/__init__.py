"""What a choice costs in quality, measured on a text: `metalstep eval`."""
