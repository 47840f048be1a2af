"""What a device must do (device.py), a room for each that does it, and the choice of one (choice.py)."""
