"""One file per way of moving slabs; base.py says what all of them must do."""
