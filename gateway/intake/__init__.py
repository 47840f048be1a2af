"""From the bytes of a body to a prompt's token ids, away from the event loop where that takes long.

Owns: where a body is worked on. Small bodies without a chat template are done in place; all others go
to processes that may be slow, run out of memory or die without anybody but their client noticing.
"""
