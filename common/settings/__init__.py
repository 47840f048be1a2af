"""Every setting, and where it comes from: flags, environment, file."""
