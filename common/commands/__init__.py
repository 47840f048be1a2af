"""The subcommands of `pdq`. None of them imports torch, the engine or the gateway."""
